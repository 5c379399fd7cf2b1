"""What is given as a model but is not the folder of one: one line that says what to give."""

import json

import pytest
from tiny_models import make_config

from dist_int8.checkpoint import resolve_model
from dist_int8.models import describe, load_config


def write_config(folder, **changes):
    fields = {**make_config("llama").to_dict(), **changes}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def refuse(model):
    """What both who need only the config and who need weights are told."""
    messages = []
    for read in (resolve_model, load_config):
        with pytest.raises(ValueError) as error:
            read(model)
        messages.append(str(error.value))
    assert "\n" not in messages[0] and messages[0] == messages[1]
    return messages[0]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.gguf", "a file of llama.cpp; give the folder or hub id of the original model"),
        ("model.safetensors", "a file; give the folder that it is in: {folder}"),
        ("config.json", "a file; give the folder that it is in: {folder}"),
        ("notes", "a file; give the folder that it is in: {folder}"),
    ],
)
def test_a_file_is_refused_with_what_to_give(tmp_path, name, part):
    (tmp_path / name).write_bytes(b"x")
    assert part.format(folder=tmp_path) in refuse(tmp_path / name)
    assert refuse(str(tmp_path / name))


def test_a_path_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert f"a link to {tmp_path}/gone, which is not there" in refuse(tmp_path / "link")
    assert "no such folder" in refuse(tmp_path / "nowhere")
    assert "no such file, and GGUF is not read" in refuse(tmp_path / "nowhere.gguf")
    assert "not a path" in refuse("x" * 5000 + "/y/z")


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ([], "got none (the folder is empty)"),
        (["a.gguf", "tokenizer.json"], "got none but .gguf files of llama.cpp"),
        (["params.json"], "params.json of an original release"),
        (["snapshots/"], "the model is in a folder of snapshots/"),
        (["checkpoint-10/", "checkpoint-10/config.json"], "checkpoint-10 does)"),
    ],
)
def test_a_folder_without_a_config_says_what_it_holds(tmp_path, files, part):
    for name in files:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"must hold a config\.json, got none") as error:
        load_config(tmp_path)
    assert part in str(error.value)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_refused_beside_a_model_too(tmp_path, whole):
    # transformers with peft would apply it
    (tmp_path / "adapter_config.json").write_text("{}")
    if whole:
        write_config(tmp_path)
    with pytest.raises(ValueError, match=r"got an adapter .*merge_and_unload"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "got 'gptq' in 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "got 'awq' in 4 bits"),
        ({"quant_method": "compressed-tensors"}, "got 'compressed-tensors'"),
        ({"quant_method": "mxfp4"}, "got 'mxfp4'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "got 'fp8'"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            r"got bitsandbytes in 4 bits \(nf4\)",
        ),
        ({"load_in_4bit": True, "load_in_8bit": False}, r"got bitsandbytes in 4 bits \(fp4\)"),
        (
            {"quant_method": "dist_int8", "version": 99},
            "got dist_int8 in version 99, this program knows 1 and 2",
        ),
        ({}, "got a form without a quant_method"),
        ("nf4", "got 'nf4'"),
    ],
)
def test_other_quantized_forms_are_named_with_what_to_give(tmp_path, written, named):
    with pytest.raises(
        ValueError, match=rf"config\.json:quantization_config: .*{named}; give the o"
    ):
        load_config(write_config(tmp_path, quantization_config=written))


@pytest.mark.parametrize(
    ("key", "value"),
    [("skip_modules", "lm_head"), ("num_hot_columns", "16"), ("embedding", 3)],
)
def test_fields_of_our_own_form_are_checked(tmp_path, key, value):
    ours = {"quant_method": "dist_int8", "version": 1, "skip_modules": [], key: value}
    with pytest.raises(ValueError, match=rf"quantization_config\.{key}: must be"):
        load_config(write_config(tmp_path, quantization_config=ours))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be JSON, got Expecting value"),
        (b'{"model_type": "llama"', "must be JSON, got Expecting"),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"model_type": "\xff"}', "must be JSON in UTF-8, got byte 0xff at 16"),
        (b'{"model_type": NaN}', "NaN, which is not JSON"),
        (b"[" * 100_000, "too many levels of nesting"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs; run `git lfs pu"),
    ],
)
def test_a_damaged_config_is_one_line(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    write_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert describe(load_config(tmp_path)).num_blocks == 3
