""".bin files: read only if allowed, by the restricted unpickler, which runs nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import load_tiny_stage

from dist_int8.checkpoint import CheckpointReader
from dist_int8.checkpoint.writer import quantize


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def to_bins(folder, count=2, **options):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        file = f"pytorch_model-{i + 1:05}-of-{count:05}.bin"
        part = {name: tensors[name] for name in list(tensors)[i::count]}
        torch.save(part, folder / file, **options)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("as_zip", [True, False])
def test_bin_files_give_the_stage_of_safetensors_files(folder_of, tmp_path, as_zip):
    folder = folder_of("llama")
    expected = load_tiny_stage(folder).state_dict()
    to_bins(folder, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ValueError, match=r"a pickle, which can run code.*--allow-pickle"):
        load_tiny_stage(folder)
    stage = load_tiny_stage(folder, allow_pickle=True).state_dict()
    assert all(torch.equal(stage[name], expected[name]) for name in expected)
    quantize(folder, tmp_path / "int8", allow_pickle=True).run()
    stage = load_tiny_stage(tmp_path / "int8").state_dict()
    assert all(torch.equal(stage[name], expected[name]) for name in expected)


@pytest.mark.parametrize("what", ["trap", "list", "object", "truncated"])
def test_anything_but_tensors_is_refused_and_not_run(tmp_path, what):
    path = tmp_path / "pytorch_model.bin"
    state = {"x": torch.ones(3)}
    values = {"trap": state | {"y": Trap(tmp_path / "ran")}, "list": [1], "object": {"x": 1}}
    torch.save(values.get(what, state), path)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"damaged or truncated file pytorch_model\.bin") as error:
        CheckpointReader(tmp_path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    assert "\n" not in str(error.value)


def test_an_index_of_safetensors_files_that_names_pickles_is_refused(folder_of):
    folder = folder_of("llama")
    to_bins(folder)
    (folder / "pytorch_model.bin.index.json").rename(folder / "model.safetensors.index.json")
    with pytest.raises(ValueError, match="which is not a file name of this folder"):
        CheckpointReader(folder, allow_pickle=True)
