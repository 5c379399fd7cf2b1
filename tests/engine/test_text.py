"""Text as it arrives: whole characters only, nothing past a stop string."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_int8.engine.text import TextStream

END, TURN = "<|im_end|>", "<|turn|>"


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer: every byte is a token, so that characters arrive in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.add_special_tokens({"additional_special_tokens": [END, TURN]})
    return tokenizer


@pytest.fixture(scope="module")
def fallback():
    """A tokenizer with byte tokens for characters that it lacks, as Llama-2's."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁abc", "bcd"]
    ids = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": [END, TURN]})
    return tokenizer


def answer(tokenizer, ids, stop):
    """The text of tokens up to a stop string, and how many tokens that took."""
    texts, pieces = TextStream(tokenizer, stop), []
    for token_id in ids:
        pieces.append(texts.push(token_id))
        if texts.stopped:
            break
    pieces.append(texts.finish())
    assert "".join(pieces) == texts.text
    return texts.text, len(pieces) - 1, texts.stopped


def stream(tokenizer, text, stop=()):
    texts = TextStream(tokenizer, stop)
    pieces = [texts.push(token_id) for token_id in tokenizer(text).input_ids]
    return texts, [*pieces, texts.finish()]


@pytest.mark.parametrize("text", ["plain words", "Größe 大きい 🙂 end", " leading\nlines\n"])
def test_the_pieces_join_to_the_text(tokenizer, text):
    texts, pieces = stream(tokenizer, text)
    assert "".join(pieces) == text == texts.text
    assert all("�" not in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte(tokenizer):
    _, pieces = stream(tokenizer, "é")
    assert pieces == ["", "é", ""]


def test_an_unfinished_character_is_shown_as_replacement_at_the_end(tokenizer):
    texts = TextStream(tokenizer)
    texts.push(tokenizer("é").input_ids[0])
    assert texts.finish() == "�"


def test_a_stop_string_ends_the_text_before_it(tokenizer):
    texts, pieces = stream(tokenizer, "one two STOP three", stop=["STOP"])
    assert texts.stopped and texts.text == "one two " == "".join(pieces)


def test_what_could_begin_a_stop_string_is_held_back(tokenizer):
    texts = TextStream(tokenizer, ["\n\nQ"])
    seen = [texts.push(token_id) for token_id in tokenizer("a\n\nb").input_ids]
    assert seen == ["a", "", "", "\n\nb"]


def test_the_earliest_stop_string_wins(tokenizer):
    texts, _ = stream(tokenizer, "abcdef", stop=["def", "cd"])
    assert texts.text == "ab"


def test_without_a_tokenizer_there_is_no_text():
    texts = TextStream(None)
    assert texts.push(3) == "" and texts.finish() == ""


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        (f"ab{END}cd", [END], "ab"),
        (f"{END}cd", [END], ""),
        (f"ab\n{END}cd", [f"\n{END}"], "ab"),
        (f"ab{TURN}cd{END}", [f"cd{END}"], "ab"),
        (f"ab{END}cd{TURN}", [f"{END}cd"], "ab"),
        (f"ab{END}{TURN}cd", [f"{END}{TURN}"], "ab"),
        (f"a{TURN}é\n{END}", [f"é\n{END}"], "a"),
        (f"a{TURN}b{TURN}cd", ["cd"], "ab"),
        (f"a{TURN}bc", [END[:-1], "bc"], "a"),
        ("a<|im_ende", [END], None),  # spelled by other tokens, and not all of it
        ("a<|im_end|>", [END[:5]], "a"),  # within the special token
        (f"a{TURN}b{END}c", ["im"], "ab"),
        (f"ab{END}c", ["bc"], None),  # the special token stands between
    ],
)
def test_a_stop_string_sees_special_tokens(tokenizer, text, stop, kept):
    ids = tokenizer(text).input_ids
    got, count, stopped = answer(tokenizer, ids, stop)
    assert stopped == (kept is not None)
    if stopped:
        assert got == kept
        assert any(each in tokenizer.decode(ids[:count]) for each in stop)
        assert not any(each in tokenizer.decode(ids[: count - 1]) for each in stop)
    else:
        assert got == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stop_string_of_byte_tokens_ends_with_its_last_byte(fallback):
    ids = fallback("a😀😀é", add_special_tokens=False).input_ids
    assert answer(fallback, ids, ["😀"]) == ("a", 5, True)
    assert answer(fallback, ids, ["é"]) == ("a😀😀", 11, True)
    ids = fallback(f"a😀{END}a", add_special_tokens=False).input_ids
    assert answer(fallback, ids, [END]) == ("a😀", 6, True)
    assert answer(fallback, ids, [f"😀{END}"]) == ("a", 6, True)


def test_what_a_token_adds_past_a_stop_string_is_left_out(fallback):
    ids = fallback.convert_tokens_to_ids(["a", "▁abc", "bcd"])
    assert answer(fallback, ids, ["b"]) == ("a a", 2, True)
    assert answer(fallback, ids, ["cb"]) == ("a ab", 3, True)


def test_of_overlapping_stop_strings_the_first_to_be_complete_ends_the_answer(tokenizer):
    ids = tokenizer("xabcdef").input_ids
    assert answer(tokenizer, ids, ["abcdef", "cd"]) == ("xab", 5, True)
    assert answer(tokenizer, ids, ["bc", "abc"]) == ("x", 4, True)


def find_first(tokenizer, ids, stop):
    """The same from whole texts: the first token that completes one, and the text before it."""
    for count in range(1, len(ids) + 1):
        shown = tokenizer.decode(ids[:count])
        places = [place for each in stop if (place := shown.find(each)) >= 0]
        if places:
            return shown[: min(places)].replace(END, "").replace(TURN, ""), count, True
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids), False


def test_stop_strings_end_an_answer_where_its_whole_text_says(tokenizer):
    draw = random.Random(0)
    parts = ["a", "b", "c", "é", "\n", "😀", END, TURN]
    for _ in range(2000):
        ids = tokenizer("".join(draw.choices(parts, k=draw.randint(1, 10)))).input_ids
        stop = ["".join(draw.choices(parts, k=draw.randint(1, 3))) for _ in range(2)]
        assert answer(tokenizer, ids, stop) == find_first(tokenizer, ids, stop), (ids, stop)
