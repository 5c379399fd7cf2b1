"""Text as it arrives: whole characters only, nothing past a stop string."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_int8.engine.text import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer: every byte is a token, so that characters arrive in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


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
