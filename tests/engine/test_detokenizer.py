"""The text of tokens as they arrive is the tokenizer's text of all of them, whatever they are."""

import json
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dist_int8.cli.demo_model import cache_folder
from dist_int8.engine.detokenizer import StepDetokenizer, WindowDetokenizer, make_detokenizer
from dist_int8.engine.text import TextStream

WORDS = "the cat sat on the mat , don't you think ? it 's grand . Größe, 漢字 and 🙂"
SPECIAL = ["<|end|>", "<|a b|>"]


def of_mistral(name, folder):
    """One of the real vocabularies in the package mistral-common."""
    common = pytest.importorskip("mistral_common")
    is_tekken = name.endswith("json")
    target = folder / ("tekken.json" if is_tekken else "tokenizer.model")
    shutil.copy(Path(common.__file__).parent / "data" / name, target)
    fields = {} if is_tekken else {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    # converted to a tokenizer of `tokenizers`; the other way is tested below
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)


def of_the_demo_model(folder):
    """The byte-level BPE of SmolLM2."""
    found = sorted(cache_folder().glob("smollm2-*/tokenizer.json"))
    if not found:
        pytest.skip("dist-int8 demo-model was not run")
    return AutoTokenizer.from_pretrained(found[0].parent, trust_remote_code=False)


def train(model, trainer, pre_tokenizer, decoder, normalizer=None, **options):
    """A small vocabulary of the kind of another real one."""
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator([WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def word_piece(cleans_up):
    return train(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[CLS]"]),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(cleanup=cleans_up),
        unk_token="[UNK]",
        clean_up_tokenization_spaces=cleans_up,
    )


def unigram():
    return train(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>"),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
        unk_token="<unk>",
        clean_up_tokenization_spaces=True,
    )


def word_ends():
    return train(
        models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"),
        trainers.BpeTrainer(
            vocab_size=90, end_of_word_suffix="</w>", special_tokens=["<unk>"], show_progress=False
        ),
        pre_tokenizers.BertPreTokenizer(),
        decoders.BPEDecoder(),
        unk_token="<unk>",
    )


def words():
    """Words without a decoder, joined with spaces."""
    return train(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(special_tokens=["<unk>"]),
        pre_tokenizers.WhitespaceSplit(),
        None,
        unk_token="<unk>",
    )


def byte_level(**options):
    return train(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
        **options,
    )


def byte_fallback(right=0):
    """As Llama-2's and Gemma's: characters outside the vocabulary are runs of <0xNN>."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "▁▁", "n't"]
    made = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, right)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


REAL = {
    name: lambda folder, name=name: of_mistral(name, folder)
    for name in (
        "tokenizer.model.v1",
        "mistral_instruct_tokenizer_240216.model.v2",
        "mistral_instruct_tokenizer_240323.model.v3",
        "mistral_instruct_tokenizer_241114.model.v7",
        "tekken_240718.json",
        "tekken_240911.json",
    )
} | {"demo model": of_the_demo_model}
MADE = {
    "WordPiece": lambda folder: word_piece(False),
    "WordPiece, cleaned up": lambda folder: word_piece(True),
    "Unigram, Metaspace, cleaned up": lambda folder: unigram(),
    "word ends": lambda folder: word_ends(),
    "no decoder": lambda folder: words(),
    "byte level": lambda folder: byte_level(),
    "byte fallback": lambda folder: byte_fallback(),
}
ALL = REAL | MADE


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return cache(lambda name: ALL[name](tmp_path_factory.mktemp("vocabulary")))


EMOJI = ("😀", "👨\u200d👩\u200d👧", "🇫🇷🇩🇪", "🏳\ufe0f\u200d🌈", "👍🏽")
LETTERS = (
    "漢字",
    "𠮷",
    "日本語です",
    "é",
    "e\u0301",
    "ก็ไทย",
    "नमस्ते",
    "한국어",
    "ß",
    "Ω",
    "\U0001d518",
    "ﷺ",
)
OTHER = (" ", "  ", "\n", "\t", "\u200d", "\u202e", "\ufffd", "▁", "Ġ", "<0x41>", ".", "'", ",")
ENGLISH = ("the", "cat", " cat", "don't", "'s", "n't", "a", " .", " ' ", " n't")
PARTS = (*EMOJI, *LETTERS, *OTHER, *ENGLISH, *SPECIAL)


def draw_ids(tokenizer, draw):
    """Token ids of a text of odd characters, or random ones, or a text cut within characters."""
    size = len(tokenizer)
    if draw.random() < 0.4:
        return [draw.randrange(size) for _ in range(draw.randint(1, 24))]
    text = "".join(draw.choice(PARTS) for _ in range(draw.randint(1, 12)))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if draw.random() < 0.4:
        place = draw.randint(0, len(ids))
        ids = [*ids[place:], draw.randrange(size), *ids[:place]][draw.randint(0, 2) :]
    return ids


def check(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token_id) for token_id in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == tokenizer.decode(ids, skip_special_tokens=True), ids


@pytest.mark.parametrize("name", ALL)
def test_the_pieces_join_to_the_text_of_all_tokens(load, name):
    tokenizer, draw = load(name), random.Random(name)
    assert isinstance(make_detokenizer(tokenizer), StepDetokenizer)
    for _ in range(60):
        check(tokenizer, draw_ids(tokenizer, draw))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_ten_thousand_texts_join_to_the_text_of_all_tokens(load, name):
    tokenizer, draw = load(name), random.Random(f"more of {name}")
    for _ in range(10_000 // len(ALL) + 1):
        check(tokenizer, draw_ids(tokenizer, draw))


def test_spaces_are_stripped_from_both_ends():
    tokenizer, draw = byte_fallback(right=1), random.Random(0)
    assert isinstance(make_detokenizer(tokenizer), StepDetokenizer)
    for _ in range(500):  # "a" first: `tokenizers` cannot strip the end of an empty text
        ids = tokenizer.convert_tokens_to_ids(["a", *draw.choices(["▁", "▁▁", "a", "▁a"], k=6)])
        check(tokenizer, ids)


@pytest.mark.parametrize("name", ALL)
def test_stop_strings_that_never_come_change_nothing(load, name):
    tokenizer, draw = load(name), random.Random(name)
    for _ in range(20):
        check(tokenizer, draw_ids(tokenizer, draw), ["\x00", "a\x00", "<|never|>"])


def test_a_tokenizer_of_which_nothing_is_known_is_decoded_in_windows(tmp_path):
    """transformers reads tekken.json with mistral-common itself where it is installed."""
    of_mistral("tekken_240911.json", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert isinstance(make_detokenizer(tokenizer), WindowDetokenizer)
    draw = random.Random(0)
    for _ in range(100):
        ids = [draw.randrange(1000, 131072) for _ in range(draw.randint(1, 80))]
        check(tokenizer, ids)
        check(tokenizer, ids, ["\x00"])


def test_a_decoder_that_does_what_its_parts_do_not_is_found(load):
    tokenizer = byte_level()
    tokenizer._decode = None  # only its class counts

    class Other(type(tokenizer)):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    tokenizer.__class__ = Other
    del tokenizer._decode
    assert isinstance(make_detokenizer(tokenizer), WindowDetokenizer)
    ids = tokenizer("the cat").input_ids
    check(tokenizer, ids)


@pytest.mark.parametrize("name", [*REAL, "WordPiece", "byte level"])
def test_text_arrives_while_it_is_made(load, name):
    """At most a few tokens late, but for a run of byte tokens, whose end decides what it is."""
    tokenizer = load(name)
    ids = tokenizer("the cat sat on the mat, and you think it is grand. " * 4).input_ids
    stream = TextStream(tokenizer)
    for i, token_id in enumerate(ids):
        stream.push(token_id)
        soon = tokenizer.decode(ids[: max(0, i - 1)], skip_special_tokens=True)
        assert len(stream.text) >= len(soon) - 1


def test_the_cost_of_a_token_does_not_grow(load):
    """No step holds or reads more than what is undecided."""
    tokenizer = load("byte level")
    decoder = make_detokenizer(tokenizer)
    for token_id in tokenizer("the cat sat " * 500).input_ids:
        decoder.push(token_id)
        assert all(len(step.held or "") < 4 for step in decoder.steps)
