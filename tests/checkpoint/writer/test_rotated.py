"""Rotated int8 checkpoints: the same stages as from the floating one, and never misread."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    assert_same_stage,
    compute_logits,
    find_tiny_columns,
    load_tiny_stage,
    read_spec,
)

from dist_int8.checkpoint import read_stored_format
from dist_int8.checkpoint.writer import dequantize, manifest, quantize
from dist_int8.int8 import reference
from dist_int8.int8.embedding import Int8Embedding
from dist_int8.int8.linear import Int8Linear
from dist_int8.models import StageSlice, load_config

MODELS = ["llama", "llama_tied", "bloom", "opt", "gpt_neox"]
SHARD = 30_000
IDS = torch.arange(30)


def rotations(stage):
    linears = (module for module in stage.modules() if isinstance(module, Int8Linear))
    return {linear.rotation for linear in linears}


def change(folder, edit):
    """Edits the tensors of a checkpoint that is one file."""
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def configure(folder, **changes):
    """Changes quantization_config; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    written = config["quantization_config"] | changes
    config["quantization_config"] = {k: v for k, v in written.items() if v is not None}
    path.write_text(json.dumps(config))


@pytest.fixture
def rotated(originals, tmp_path):
    quantize(originals["llama"], tmp_path / "rotated", rotation=64).run()
    return tmp_path / "rotated"


@pytest.mark.parametrize("name", MODELS)
def test_it_gives_the_stages_of_the_floating_checkpoint(originals, tmp_path, name):
    options = {"skip": [], "embedding_int8": True, "calibrate": "random", "rotation": 64}
    quantize(originals[name], tmp_path / "int8", **options, shard_bytes=SHARD).run()
    assert manifest.verify(tmp_path / "int8") > 3
    spec = read_spec(originals[name])
    hot = find_tiny_columns(originals[name], stage_slice=StageSlice.whole(spec))
    floating = {"hot_columns": hot, "rotation": 64, "embedding_int8": True, "skip": []}
    expected = load_tiny_stage(originals[name], **floating)
    stage = load_tiny_stage(tmp_path / "int8")
    assert_same_stage(stage, expected)
    assert rotations(stage) == rotations(expected) == {64}
    last = StageSlice(range(1, 2), first=False, last=True)
    expected = load_tiny_stage(originals[name], last, **floating)
    assert_same_stage(load_tiny_stage(tmp_path / "int8", last), expected)
    assert isinstance(stage.embedding, Int8Embedding)
    exact = load_tiny_stage(originals[name], int8=False)
    table = exact.embedding.weight.float()
    assert (stage.embedding(IDS, torch.float32) - table[IDS]).abs().max() < 0.01 * table.abs().max()
    expected = compute_logits(exact, IDS)
    error = (compute_logits(stage, IDS) - expected).norm() / expected.norm()
    assert error < 0.05


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_load_quantizes_as_the_layer_itself_does(originals, name):
    """In slices, of matrices that are made of several tensors, bit for bit."""
    hot = {"blocks.0.qkv": [3, 17, 40], "blocks.1.down": [0, 5]}
    floating = load_tiny_stage(originals[name], int8=False)
    stage = load_tiny_stage(originals[name], rotation=16, hot_columns=hot, outlier_rule="none")
    for path, layer in stage.named_modules():
        if isinstance(layer, Int8Linear):
            linear = floating.get_submodule(path)
            expected = Int8Linear.from_linear(linear, 0.0, "none", hot.get(path), 16).state_dict()
            assert all(torch.equal(layer.state_dict()[key], expected[key]) for key in expected)


def test_weights_near_the_smallest_number_are_zeros_as_in_the_layer(folder_of):
    folder = folder_of("llama")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    weight = tensors["model.layers.0.mlp.down_proj.weight"].float()
    tensors["model.layers.0.mlp.down_proj.weight"] = weight * 2.0**-115
    save_file(tensors, file)
    linear = load_tiny_stage(folder, int8=False).blocks["0"].down
    expected = Int8Linear.from_linear(linear, 0.0, "none", rotation=4)
    got = load_tiny_stage(folder, rotation=4).blocks["0"].down
    assert torch.equal(got.col_scale, expected.col_scale)
    assert torch.equal(got.weight_int8, expected.weight_int8)
    assert (got.col_scale == 0).any()


def test_dequantize_rotates_back(rotated, tmp_path):
    stage = load_tiny_stage(rotated)
    floating = load_tiny_stage(rotated, int8=False)
    dequantize(rotated, tmp_path / "floating", dtype="float32").run()
    assert_same_stage(load_tiny_stage(tmp_path / "floating", int8=False), floating)
    for path in ("blocks.0.qkv", "blocks.1.down", "blocks.0.gate_up"):
        weight = stage.get_submodule(path).dequantize()
        assert torch.equal(floating.get_submodule(path).weight, weight)


def test_int8_checkpoints_keep_their_rotation(rotated, tmp_path, caplog):
    quantize(rotated, tmp_path / "again").run()
    for file in sorted(rotated.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    quantize(rotated, tmp_path / "asked", rotation=64)
    with pytest.raises(ValueError, match="rotation must be chosen when a checkpoint is quantized"):
        quantize(rotated, tmp_path / "other", rotation=32)
    with pytest.raises(ValueError, match="rotation must be 0 for bitsandbytes, which has none"):
        quantize(rotated, tmp_path / "other", target="bitsandbytes", rotation=64)
    assert not caplog.text


def test_a_rerun_with_another_rotation_is_another_checkpoint(originals, rotated):
    assert quantize(originals["llama"], rotated, rotation=64).run() is False
    with pytest.raises(ValueError, match="with other settings"):
        quantize(originals["llama"], rotated, rotation=32).run()


def test_bitsandbytes_gets_weights_that_are_rotated_back(rotated, tmp_path, caplog):
    quantize(rotated, tmp_path / "bnb", target="bitsandbytes").run()
    assert "rounded a second time for bitsandbytes" in caplog.text
    stage = load_tiny_stage(tmp_path / "bnb")
    assert rotations(stage) == {0}
    floating = load_tiny_stage(rotated, int8=False)
    weight = floating.blocks["0"].down.weight
    assert torch.equal(stage.blocks["0"].down.weight_int8, reference.quantize_weight(weight)[0])
    back = quantize(tmp_path / "bnb", tmp_path / "back")
    back.run()
    assert "rotation" not in json.dumps(back.plan.config)


def test_config_says_so_in_a_version_that_older_releases_refuse(rotated, originals, tmp_path):
    written = json.loads((rotated / "config.json").read_text())["quantization_config"]
    assert (written["version"], written["rotation"]) == (2, 64)
    names = load_file(rotated / "model-00001-of-00001.safetensors")
    assert "model.layers.0.mlp.down_proj.rotated_scale" in names
    assert names["model.layers.0.mlp.down_proj.rotation"] == 64
    assert not any(name.endswith("col_scale") for name in names)
    quantize(originals["llama"], tmp_path / "plain").run()
    written = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert written["version"] == 1 and "rotation" not in written
    assert read_stored_format(rotated, read_spec(rotated)).rotation == 64
    assert read_stored_format(tmp_path / "plain", read_spec(rotated)).rotation == 0


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda t: t.pop(f"{DOWN}.rotation"), "must have both of"),
        (
            lambda t: t.update({f"{DOWN}.col_scale": t.pop(f"{DOWN}.rotated_scale")}),
            "must have both of",
        ),
        (
            lambda t: t.update({f"{DOWN}.rotation": torch.tensor(48, dtype=torch.int32)}),
            f"{DOWN}.rotation must be a power of two from 2 to 1024, got 48",
        ),
        (
            lambda t: t.update({f"{DOWN}.rotation": torch.tensor(0, dtype=torch.int32)}),
            f"{DOWN}.rotation must be a power of two from 2 to 1024, got 0",
        ),
        (
            lambda t: t.update({f"{DOWN}.rotation": torch.tensor([64, 64], dtype=torch.int32)}),
            f"{DOWN}.rotation must have shape [], got [2]",
        ),
        (
            lambda t: t.update({f"{DOWN}.rotation": torch.tensor(32, dtype=torch.int32)}),
            f"{DOWN}.weight must be rotated in blocks of 64, as config.json says (rotation), got",
        ),
        (
            lambda t: t.update(
                {"model.layers.1.self_attn.k_proj.rotation": torch.tensor(2, dtype=torch.int32)}
            ),
            "v_proj.weight must have the same rotation, because they make one matrix here",
        ),
    ],
)
def test_edited_tensors_are_refused_by_name(rotated, edit, part):
    change(rotated, edit)
    with pytest.raises(ValueError, match="checkpoint must fit its config") as error:
        load_tiny_stage(rotated)
    assert part in str(error.value)


def unrotate(tensors):
    """Takes the rotation of one linear away, as if it came from another checkpoint."""
    del tensors[f"{DOWN}.rotation"]
    tensors[f"{DOWN}.col_scale"] = tensors.pop(f"{DOWN}.rotated_scale")


def test_linears_with_and_without_rotation_work_where_no_config_contradicts(rotated, tmp_path):
    change(rotated, unrotate)
    with pytest.raises(ValueError, match=r"down_proj\.weight must be rotated in blocks of 64"):
        load_tiny_stage(rotated)
    config = json.loads((rotated / "config.json").read_text())
    del config["quantization_config"]
    (rotated / "config.json").write_text(json.dumps(config))
    stage = load_tiny_stage(rotated)
    assert rotations(stage) == {0, 64}
    assert stage.blocks["0"].down.rotation == 0
    linear = stage.blocks["0"].down
    x = torch.randn(3, 80)
    scaled = reference.dequantize_weight(linear.weight_int8, linear.col_scale)
    assert torch.equal(linear.dequantize(), scaled)
    torch.testing.assert_close(linear(x), x @ scaled.T, rtol=0.1, atol=0.1)
    assert read_stored_format(rotated, read_spec(rotated)).rotation == 0
    assert compute_logits(stage, IDS).isfinite().all()  # op by op where linears differ
    with pytest.raises(ValueError, match=r"one rotation, got 0 in blocks.0.down, 64 in blocks"):
        quantize(rotated, tmp_path / "again")


@pytest.mark.parametrize(
    "changes",
    [{"version": 1}, {"rotation": 48}, {"rotation": "64"}, {"rotation": None}, {"rotation": True}],
)
def test_a_config_that_contradicts_itself_is_refused(rotated, changes):
    configure(rotated, **changes)
    with pytest.raises(ValueError, match=r"rotation: must be a power of two from 2 to 1024 in ver"):
        load_config(rotated)


def test_a_version_of_the_future_is_refused(rotated):
    configure(rotated, version=3)
    with pytest.raises(ValueError, match="in version 3, this program knows 1 and 2"):
        load_config(rotated)


def test_a_tied_int8_head_does_not_share_the_table_of_the_embedding(originals, tmp_path):
    """Rows of the embedding are looked up, the head is rotated: the checkpoint has both."""
    options = {"skip": [], "embedding_int8": True}
    quantize(originals["llama_tied"], tmp_path / "int8", rotation=64, **options).run()
    stage = load_tiny_stage(tmp_path / "int8")
    expected = load_tiny_stage(originals["llama_tied"], rotation=64, **options)
    assert_same_stage(stage, expected)
    for loaded in (stage, expected):
        assert loaded.lm_head.rotation == 64
        assert loaded.lm_head.weight_int8.data_ptr() != loaded.embedding.weight_int8.data_ptr()
    shared = load_tiny_stage(originals["llama_tied"], rotation=0, **options)
    assert shared.lm_head.weight_int8.data_ptr() == shared.embedding.weight_int8.data_ptr()
