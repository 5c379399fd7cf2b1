"""Tokenizers: those of a folder, never code of their own."""

import json

import pytest
import torch

from dist_int8.models.tokenizer import load_tokenizer, read_tokens


def test_the_tokenizer_of_a_folder_is_loaded(tiny_llama):
    assert load_tokenizer(tiny_llama).decode(load_tokenizer(tiny_llama)("Once").input_ids) == "Once"


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a tokenizer .*; add its files$") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"; do this$"):
        load_tokenizer(tmp_path, advice="do this")


def test_code_of_a_tokenizer_is_refused_and_not_run(tmp_path):
    (tmp_path / "tokenization_x.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w').close()\n"
    )
    fields = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="must hold a tokenizer"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_first_tokens_of_a_text_are_read(tiny_llama, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc" * 100)
    tokens = read_tokens(tiny_llama, path, 7)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == load_tokenizer(tiny_llama)("abcabca").input_ids
    with pytest.raises(ValueError, match="must be random, off or a text file"):
        read_tokens(tiny_llama, tmp_path / "nowhere", 7)
