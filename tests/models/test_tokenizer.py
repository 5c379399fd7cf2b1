"""Tokenizers: those of a folder, whole and of this model, never code of their own."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerFast

from dist_int8.models.tokenizer import load_tokenizer, read_tokenizer, read_tokens


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A copy of a model's config and tokenizer."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def sentencepiece_model():
    """SentencePiece's model of Mistral-7B-v0.1."""
    common = pytest.importorskip("mistral_common")
    return Path(common.__file__).parent / "data" / "tokenizer.model.v1"


def test_the_tokenizer_of_a_folder_is_loaded(tiny_llama):
    assert load_tokenizer(tiny_llama).decode(load_tokenizer(tiny_llama)("Once").input_ids) == "Once"
    assert (
        read_tokenizer(tiny_llama, 288)("Once").input_ids
        == load_tokenizer(tiny_llama)("Once").input_ids
    )


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a tokenizer .*, got none; add its files$"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"; do this$"):
        load_tokenizer(tmp_path, advice="do this")


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "qwen2", "bloom", "mistral"])
def test_nothing_is_made_up_where_there_is_no_vocabulary(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_tokenizer(tmp_path, 100) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must hold the tokenizer's vocabulary.* alone; "):
        read_tokenizer(tmp_path, 100)


@pytest.mark.parametrize("text", ['{"model_type": ', "[" * 100_000, '{"a": NaN}', "[]"])
def test_a_config_that_is_not_json_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: must be (a )?JSON"):
        load_tokenizer(folder)


CUT = '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vo'
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CUT, "cut off"),
        (LFS, "pointer of git-lfs"),
        ("", "an empty file"),
        ("[]", "must be a JSON object"),
        ('{"added_tokens" 3}', "Expecting ':'"),
    ],
)
def test_a_damaged_file_is_refused_by_its_reason(folder, name, text, reason):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        read_tokenizer(folder, 288)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_folder_and_a_broken_link_are_no_files(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer.json: must be a file, got a folder"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").rmdir()
    (folder / "tokenizer.json").symlink_to(folder / "gone")
    with pytest.raises(ValueError, match=r"readable file, got No such file"):
        read_tokenizer(folder)


def test_a_vocabulary_without_tokens_is_refused(folder):
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["model"]["vocab"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="must have tokens for English, got none"):
        read_tokenizer(folder)


def test_a_vocabulary_of_unknown_tokens_is_refused(folder):
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["model"] = {"type": "WordLevel", "vocab": {"<unk>": 0, "ß": 1}, "unk_token": "<unk>"}
    fields["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    (folder / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}')
    with pytest.raises(ValueError, match=r"must have tokens for English, got \d+ unknown ones"):
        read_tokenizer(folder)


def test_a_vocabulary_past_the_embedding_is_another_models(folder):
    assert len(read_tokenizer(folder, 257)) == 257
    with pytest.raises(ValueError, match=r"must be below 200, .*, got 255 for"):
        read_tokenizer(folder, 200)


def test_an_added_token_past_the_embedding_is_told(folder, caplog):
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"pad_token": "[PAD]"}))
    with caplog.at_level(logging.WARNING, logger="dist_int8"):
        assert read_tokenizer(folder, 257).pad_token_id == 257
    assert "1 added tokens, such as '[PAD]', have no row" in caplog.text


def test_a_folder_with_a_sentencepiece_model_alone_is_read(tmp_path, sentencepiece_model):
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    fields = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    reference = SentencePieceProcessor(model_file=str(sentencepiece_model))
    text = "Hello world, 漢字 😀"
    ids = read_tokenizer(tmp_path, 32000)(text).input_ids
    assert ids == [reference.bos_id(), *reference.encode(text)]
    with pytest.raises(ValueError, match=r"must be below 31000"):
        read_tokenizer(tmp_path, 31000)


@pytest.mark.parametrize("content", [b"garbage", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"])
def test_a_damaged_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer.model: must be a SentencePiece model, got "):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_a_sentencepiece_model_without_its_package_names_it(tmp_path, sentencepiece_model, package):
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    code = (
        "import sys; from pathlib import Path\n"
        "from dist_int8.models.tokenizer import read_tokenizer\n"
        f"sys.modules[{package!r}] = None\n"
        "try: read_tokenizer(Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    assert "packages sentencepiece and protobuf must be installed" in said
    assert "pip install sentencepiece protobuf" in said


def test_a_tokenizer_of_tekken_is_read(tmp_path, sentencepiece_model):
    shutil.copy(sentencepiece_model.parent / "tekken_240911.json", tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    tokenizer = read_tokenizer(tmp_path, 131072)
    assert tokenizer.decode(tokenizer("漢字 😀", add_special_tokens=False).input_ids) == "漢字 😀"
    with pytest.raises(ValueError, match=r"must be below 131000"):
        read_tokenizer(tmp_path, 131000)


def test_code_of_a_tokenizer_is_refused_and_not_run(folder):
    (folder / "tokenization_x.py").write_text(f"open({str(folder / 'executed')!r}, 'w').close()\n")
    fields = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"got one that is Python code of the folder"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(fields | {"tokenizer_class": "XTokenizer"}))
    with pytest.raises(ValueError, match=r"got one that is Python code of the folder"):
        load_tokenizer(folder)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoConfig", "RagTokenizer", "pipeline", 5])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_class_that_is_no_tokenizer_is_refused(folder, file, name):
    fields = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(fields | {"tokenizer_class": name}))
    with pytest.raises(ValueError, match=rf"{file}:tokenizer_class: must be a tokenizer of"):
        read_tokenizer(folder)


def test_a_class_that_transformers_lacks_is_read_from_its_file(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "OtherTokenizer"}')
    assert isinstance(read_tokenizer(folder), PreTrainedTokenizerFast)


def test_the_first_tokens_of_a_text_are_read(tiny_llama, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc" * 100)
    tokens = read_tokens(tiny_llama, path, 7)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == load_tokenizer(tiny_llama)("abcabca").input_ids
    with pytest.raises(ValueError, match="must be random, off or a text file"):
        read_tokens(tiny_llama, tmp_path / "nowhere", 7)
    with pytest.raises(ValueError, match="must be below 100"):
        read_tokens(tiny_llama, path, 7, vocab_size=100)
