"""Reading safetensors folders, whole and damaged."""

import json

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dist_int8.checkpoint import CheckpointReader, resolve_model


def shard(folder, num_files=3):
    """Split model.safetensors into files with an index; names of the files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    weight_map = {name: files[i % num_files] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def test_reads_what_was_saved(folder_of):
    folder = folder_of("llama")
    wanted = load_file(folder / "model.safetensors")
    for _ in range(2):
        reader = CheckpointReader(folder)
        assert sorted(reader.names) == sorted(wanted)
        for name, tensor in wanted.items():
            assert name in reader
            assert reader.shape(name) == tuple(tensor.shape)
            assert reader.dtype(name) == "F32"
            assert torch.equal(reader.read(name), tensor)
        if (folder / "model.safetensors").exists():
            shard(folder)
    assert "no.such.tensor" not in reader


def test_every_missing_and_damaged_file_is_named(folder_of):
    folder = folder_of("llama")
    files = shard(folder, 4)
    (folder / files[0]).unlink()
    (folder / files[1]).unlink()
    whole = (folder / files[2]).read_bytes()
    (folder / files[2]).write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="3 problem") as error:
        CheckpointReader(folder)
    message = str(error.value)
    assert all(file in message for file in files[:3])
    assert files[3] not in message
    assert "truncated" in message
    assert "\n" not in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(folder_of, keep):
    folder = folder_of("llama")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"damaged or truncated file model\.safetensors"):
        CheckpointReader(folder)


def test_an_index_that_lists_an_absent_tensor_is_refused(folder_of):
    folder = folder_of("llama")
    file = shard(folder)[0]
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks tensors that .* lists: ghost\.weight"):
        CheckpointReader(folder)


def test_an_index_that_points_outside_the_folder_is_refused(folder_of):
    folder = folder_of("llama")
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["x"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not a file name of this folder"):
        CheckpointReader(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}'])
def test_a_broken_index_is_refused(folder_of, text):
    folder = folder_of("llama")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: must be (JSON|a JSON object)"):
        CheckpointReader(folder)


def test_the_refusal_of_a_pickle_says_what_to_do(folder_of):
    folder = folder_of("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*save_pretrained"):
        CheckpointReader(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got neither"):
        CheckpointReader(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        CheckpointReader(tmp_path / "nowhere")


def test_a_model_that_is_no_folder_and_cannot_be_fetched_is_refused(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == tmp_path
    for wrong in ("no/such/folder", "nowhere", str(tmp_path / "nowhere"), ""):
        with pytest.raises(ValueError, match="no such folder"):
            resolve_model(wrong)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="can be fetched, got 'no-such/model'") as error:
        resolve_model("no-such/model")
    assert "\n" not in str(error.value)
