"""Int8 checkpoints: the same stage as from the floating one, bit for bit, and refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import assert_same_stage, load_tiny_stage, read_spec

from dist_int8.checkpoint import read_stored_format
from dist_int8.checkpoint.writer import dequantize, manifest, quantize
from dist_int8.int8.linear import Int8Linear
from dist_int8.models import StageSlice

MODELS = ["llama", "llama_tied", "bloom", "opt", "gpt_neox"]
SHARD = 30_000  # several files per model


def rewrite(folder, file, change):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


@pytest.fixture
def int8_llama(originals, tmp_path):
    quantize(originals["llama"], tmp_path / "int8").run()
    return tmp_path / "int8"


@pytest.mark.parametrize("name", MODELS)
def test_an_int8_checkpoint_gives_the_same_stages(originals, tmp_path, name):
    job = quantize(originals[name], tmp_path / "int8", shard_bytes=SHARD)
    written = []
    assert job.num_shards > 1 and job.run(written.append)
    assert sum(written) == job.num_bytes
    assert manifest.verify(tmp_path / "int8") >= job.num_shards + 2
    assert_same_stage(load_tiny_stage(tmp_path / "int8"), load_tiny_stage(originals[name]))
    last = StageSlice(range(1, 2), first=False, last=True)
    assert_same_stage(
        load_tiny_stage(tmp_path / "int8", last), load_tiny_stage(originals[name], last)
    )
    assert not (tmp_path / ".int8.partial").exists()


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_hot_columns_survive_rewriting(originals, tmp_path, name):
    original = originals[name]
    hot = {"blocks.0.qkv": [3, 17, 40], "blocks.1.down": [0, 5]}
    quantize(original, tmp_path / "int8", hot_columns=hot, shard_bytes=SHARD).run()
    assert read_stored_format(tmp_path / "int8", read_spec(original)).num_hot_columns == 3
    # once more through our own form, which must not lose them either
    quantize(tmp_path / "int8", tmp_path / "again").run()
    floating = load_tiny_stage(original, int8=False)
    for folder in (tmp_path / "int8", tmp_path / "again"):
        stage = load_tiny_stage(folder)
        for path, columns in hot.items():
            linear = floating.get_submodule(path)
            expected = Int8Linear.from_linear(linear, hot_columns=columns).state_dict()
            got = stage.get_submodule(path).state_dict()
            assert list(got) == list(expected)
            assert all(torch.equal(got[key], expected[key]) for key in got)
        assert stage.blocks["0"].down.hot_columns is None
    dequantize(tmp_path / "int8", tmp_path / "floating").run()
    restored = load_tiny_stage(tmp_path / "floating", int8=False).blocks["0"].qkv.weight
    kept = floating.blocks["0"].qkv.weight
    assert torch.equal(restored[:, [3, 17, 40]], kept[:, [3, 17, 40]])
    assert not torch.equal(restored, kept)


def test_linears_that_an_int8_checkpoint_stores_floating_stay_floating(originals, tmp_path):
    quantize(originals["llama"], tmp_path / "int8", skip=["down", "blocks.1"]).run()
    spec = read_spec(tmp_path / "int8")
    stored = read_stored_format(tmp_path / "int8", spec)
    assert "blocks.0.down" in stored.skip and "lm_head" not in stored.skip
    stage = load_tiny_stage(tmp_path / "int8", skip=())
    assert_same_stage(stage, load_tiny_stage(originals["llama"], skip=stored.skip))
    assert isinstance(stage.lm_head, Int8Linear)
    assert not read_stored_format(originals["llama"], spec).is_int8


def test_a_tied_model_may_have_an_int8_head(originals, tmp_path):
    quantize(originals["llama_tied"], tmp_path / "int8", skip=[]).run()
    stage = load_tiny_stage(tmp_path / "int8")
    assert_same_stage(stage, load_tiny_stage(originals["llama_tied"], skip=[]))
    assert isinstance(stage.lm_head, Int8Linear)


def test_dequantize_gives_the_values_of_the_int8_weights(originals, tmp_path, int8_llama):
    stage = load_tiny_stage(int8_llama)
    floating = load_tiny_stage(int8_llama, int8=False)
    dequantize(int8_llama, tmp_path / "floating", dtype="float32").run()
    assert_same_stage(load_tiny_stage(tmp_path / "floating", int8=False), floating)
    qkv = floating.blocks["0"].qkv.weight
    assert torch.equal(qkv, stage.blocks["0"].qkv.dequantize())
    config = json.loads((tmp_path / "floating" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    with pytest.raises(ValueError, match="must have int8 weights, got none"):
        dequantize(tmp_path / "floating", tmp_path / "x")


def test_two_runs_write_the_same_bytes_and_a_rerun_writes_nothing(originals, tmp_path):
    contents = []
    for out in ("one", "two"):
        job = quantize(originals["bloom"], tmp_path / out, shard_bytes=SHARD)
        assert job.run() and not job.run()
        contents.append({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()})
    assert contents[0] == contents[1]
    with pytest.raises(ValueError, match="OUT must be a new folder or the same checkpoint"):
        quantize(originals["llama"], tmp_path / "one").run()


def test_verify_names_every_changed_missing_and_unknown_file(int8_llama):
    shard = next(int8_llama.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 4
    shard.write_bytes(content)
    load_tiny_stage(int8_llama)  # no header can tell
    (int8_llama / "generation_config.json").unlink()
    (int8_llama / "stray.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="3 problem") as error:
        manifest.verify(int8_llama)
    for part in ("generation_config.json", "stray.safetensors", f"{shard.name} has changed"):
        assert part in str(error.value)
    (int8_llama / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="must hold a manifest"):
        manifest.verify(int8_llama)


def test_a_weight_that_is_not_finite_is_refused(folder_of, tmp_path):
    folder = folder_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, "model.safetensors", lambda tensors: tensors[name][7].fill_(torch.inf))
    with pytest.raises(ValueError, match=rf"{name}: weights must be finite"):
        quantize(folder, tmp_path / "int8").run()
    assert not (tmp_path / "int8").exists()


def test_a_negative_scale_is_refused(int8_llama):
    name = "model.layers.0.mlp.up_proj.col_scale"
    shard = next(int8_llama.glob("*.safetensors")).name
    rewrite(int8_llama, shard, lambda tensors: tensors[name][2].neg_())
    with pytest.raises(ValueError, match=rf"{name}: scales must be at least 0, got -"):
        load_tiny_stage(int8_llama)


def test_calibration_refuses_activations_that_overflow(folder_of, tmp_path):
    folder = folder_of("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, "model.safetensors", lambda tensors: tensors[name].fill_(3e38))
    with pytest.raises(
        ValueError, match="activations must be finite, got NaN or Inf before blocks"
    ):
        quantize(folder, tmp_path / "int8", calibrate="random").run()
    assert not (tmp_path / "int8").exists()


def test_everything_wrong_with_an_int8_checkpoint_is_listed(int8_llama):
    base = "model.layers.0.self_attn"

    def damage(tensors):
        del tensors[f"{base}.q_proj.col_scale"]
        tensors[f"{base}.k_proj.SCB"] = torch.ones(24)
        tensors[f"{base}.v_proj.col_scale"] = torch.ones(23)
        tensors[f"{base}.o_proj.weight_format"] = torch.tensor(9)
        tensors["model.layers.1.mlp.up_proj.hot_columns"] = torch.tensor([1], dtype=torch.int32)
        tensors["model.layers.1.mlp.up_proj.hot_weight"] = torch.ones(80, 1)
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(80, 48)
        tensors["model.norm.SCB"] = torch.ones(48)

    rewrite(int8_llama, "model-00001-of-00001.safetensors", damage)
    index = int8_llama / "model.safetensors.index.json"
    (int8_llama / "model-00001-of-00001.safetensors").rename(int8_llama / "model.safetensors")
    index.unlink()
    with pytest.raises(ValueError, match="problem") as error:
        load_tiny_stage(int8_llama)
    message = str(error.value)
    for part in (
        f"{base}.q_proj.weight is int8 and must have {base}.q_proj.col_scale, ",
        "got model.layers.0.self_attn.k_proj.col_scale and",
        f"{base}.v_proj.col_scale must have shape [24], got [23]",
        f"{base}.o_proj.weight_format must be an integer 0..3",
        "must have the same hot columns",
        "unknown tensor model.norm.SCB",
        "unknown tensor model.layers.2.mlp.up_proj.col_scale",
    ):
        assert part in message, (part, message)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"hot_columns": {"blocks.0.quack": [1]}}, "must name int8 linears, got blocks.0.quack"),
        ({"hot_columns": {"blocks.0.qkv": [48]}}, "must be input features 0 .. 47"),
        ({"hot_columns": {"blocks.0.qkv": [1]}, "target": "bitsandbytes"}, "which has none"),
        ({"skip": [], "target": "bitsandbytes"}, "skip must name lm_head for bitsandbytes"),
    ],
)
def test_arguments_that_do_not_fit_the_model_are_refused(originals, tmp_path, options, part):
    with pytest.raises(ValueError, match=part):
        quantize(originals["llama_tied"], tmp_path / "int8", **options)
    assert not list(tmp_path.glob("*int8*"))
