"""Filling a stage from a checkpoint: names, dtypes, quantization, sharing, and every refusal."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import assert_same_stage, load_tiny_stage, read_spec
from transformers import AutoModelForCausalLM

from dist_int8.checkpoint import count_stage_bytes
from dist_int8.int8 import reference
from dist_int8.int8.linear import Int8Linear
from dist_int8.models import StageSlice

PREFIX = {"llama": "model.", "bloom": "transformer.", "opt": "model.", "gpt_neox": "gpt_neox."}


def rewrite(folder, change):
    """Apply `change` to the dictionary of tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def states(stage):
    return dict(sorted(stage.state_dict().items()))


@pytest.mark.parametrize("name", PREFIX)
def test_names_load_with_and_without_the_prefix(folder_of, name):
    folder = folder_of(name)
    before = load_tiny_stage(folder, int8=False)
    tensors = load_file(folder / "model.safetensors")
    assert any(key.startswith(PREFIX[name]) for key in tensors)
    bare = {key.removeprefix(PREFIX[name]): tensor for key, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors")
    assert_same_stage(load_tiny_stage(folder, int8=False), before)


def test_linears_are_quantized_as_the_specification_says(folder_of):
    folder = folder_of("bloom")
    stage = load_tiny_stage(folder, outlier_rule="row_rms", outlier_threshold=5.0)
    floating = load_tiny_stage(folder, int8=False)
    linears = [m for m in stage.modules() if isinstance(m, Int8Linear)]
    assert len(linears) == 2 * 4
    assert {m.outlier_rule for m in linears} == {"row_rms"}
    assert {m.outlier_threshold for m in linears} == {5.0}
    for path, module in stage.named_modules():
        if isinstance(module, Int8Linear):
            original = floating.get_submodule(path)
            weight_int8, col_scale = reference.quantize_weight(original.weight)
            assert torch.equal(module.weight_int8, weight_int8)
            assert torch.equal(module.col_scale, col_scale)
            assert torch.equal(module.bias, original.bias)
    assert not any(tensor.is_meta for tensor in states(stage).values())


def test_fused_linears_are_joined_in_order(folder_of):
    folder = folder_of("llama")
    tensors = load_file(folder / "model.safetensors")
    block = load_tiny_stage(folder, int8=False).blocks["1"]
    for linear, parts in (
        (block.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (block.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
    ):
        stored = [tensors[f"model.layers.1.{part}.weight"] for part in parts]
        assert torch.equal(linear.weight, torch.cat(stored))


def test_skipped_linears_stay_floating(folder_of):
    stage = load_tiny_stage(folder_of("llama"), skip=("lm_head", "down", "blocks.1"))
    assert isinstance(stage.blocks["0"].qkv, Int8Linear)
    assert type(stage.blocks["0"].down) is torch.nn.Linear
    assert type(stage.blocks["1"].qkv) is torch.nn.Linear
    assert type(stage.lm_head) is torch.nn.Linear
    assert isinstance(load_tiny_stage(folder_of("llama_tied"), skip=()).lm_head, Int8Linear)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_embedding_keeps_16_bits_below_fp32_hidden_states(folder_of, stored):
    folder = folder_of("llama_tied")
    AutoModelForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    stage = load_tiny_stage(folder)
    assert stage.embedding.weight.dtype == stored  # kept below fp32 hidden states
    assert stage.blocks["0"].mlp_norm.weight.dtype == torch.float32
    stage = load_tiny_stage(folder, dtype=torch.bfloat16)
    assert stage.embedding.weight.dtype == torch.bfloat16
    assert stage.blocks["0"].mlp_norm.weight.dtype == torch.bfloat16
    assert stage.rotary_cos.dtype == torch.float32


def test_tied_head_is_shared_within_a_stage_and_read_in_another(folder_of):
    folder = folder_of("llama_tied")
    whole = load_tiny_stage(folder, int8=False)
    assert whole.lm_head.weight is whole.embedding.weight
    last = load_tiny_stage(folder, StageSlice(range(2, 3), first=False, last=True), int8=False)
    assert torch.equal(last.lm_head.weight, whole.embedding.weight)
    assert not hasattr(last, "embedding")


def test_a_tied_head_that_is_stored_is_shared_only_if_equal(folder_of):
    folder = folder_of("llama_tied")
    embedding = "model.embed_tokens.weight"
    rewrite(folder, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    stage = load_tiny_stage(folder)
    assert stage.lm_head.weight is stage.embedding.weight
    # transformers does not tie two stored tensors that differ
    rewrite(folder, lambda t: t["lm_head.weight"].add_(1))
    stage = load_tiny_stage(folder)
    reference_model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(stage.lm_head.weight, reference_model.lm_head.weight)
    assert not torch.equal(stage.lm_head.weight, stage.embedding.weight)
    rewrite(folder, lambda t: t.pop(embedding))
    stage = load_tiny_stage(folder)
    assert stage.lm_head.weight is stage.embedding.weight


def test_progress_counts_the_bytes_of_the_stage(folder_of):
    folder = folder_of("llama_tied")
    spec = read_spec(folder)
    stored = sum(t.numel() * 4 for t in load_file(folder / "model.safetensors").values())
    totals = []
    for stage_slice, skip in (
        (StageSlice.whole(spec), ["lm_head"]),
        (StageSlice.whole(spec), []),  # the head is made from the embedding a second time
        (StageSlice(range(0, 2), first=True, last=False), ["lm_head"]),
    ):
        read = []
        load_tiny_stage(folder, stage_slice, progress=read.append, skip=skip)
        assert sum(read) == count_stage_bytes(folder, spec, stage_slice)
        totals.append(sum(read))
    assert totals[:2] == [stored, stored]
    assert totals[2] < stored


def test_loaded_tensors_survive_changes_of_the_file(folder_of):
    folder = folder_of("llama_tied")
    stage = load_tiny_stage(folder, int8=False)
    before = {name: tensor.clone() for name, tensor in states(stage).items()}
    size = (folder / "model.safetensors").stat().st_size
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\0" * size)
    assert all(torch.equal(before[name], tensor) for name, tensor in states(stage).items())


def test_every_missing_and_misshapen_tensor_is_named(folder_of):
    folder = folder_of("llama")

    def damage(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(80, 47)
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(12)
        down = "model.layers.0.mlp.down_proj.weight"
        tensors[down] = torch.zeros(48, 80, dtype=torch.int8)

    rewrite(folder, damage)
    allocated = []
    with pytest.raises(ValueError, match="5 problem") as error:
        load_tiny_stage(folder, progress=allocated.append)
    message = str(error.value)
    assert "missing tensor model.norm.weight" in message
    assert "missing tensor model.layers.1.self_attn.k_proj.weight" in message
    assert "up_proj.weight must have shape [80, 48], got [80, 47]" in message
    assert "unknown tensor model.layers.0.self_attn.q_norm.weight" in message
    assert "down_proj.weight is int8 and must have" in message
    assert allocated == []
    assert "\n" not in message


def test_damaged_files_and_misfit_tensors_are_listed_together(folder_of):
    folder = folder_of("llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    down = "model.layers.2.mlp.down_proj.weight"
    tensors[down] = tensors[down][:, 1:].contiguous()
    names = list(tensors)
    weight_map = {name: f"model-{i % 4}.safetensors" for i, name in enumerate(names)}
    weight_map[down] = "model-0.safetensors"
    for file in sorted(set(weight_map.values())):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").unlink()
    whole = (folder / "model-2.safetensors").read_bytes()
    (folder / "model-2.safetensors").write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="3 problem") as error:
        load_tiny_stage(folder)
    message = str(error.value)
    assert "missing file model-1.safetensors" in message
    assert "truncated file model-2.safetensors" in message
    assert f"{down} must have shape [48, 80], got [48, 79]" in message


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize(
    "name", ["layers.1.mlp.up_proj.weight", "layers.0.input_layernorm.weight", "norm.weight"]
)
def test_weights_that_are_not_finite_are_named(folder_of, name, value, int8):
    folder = folder_of("llama")
    rewrite(folder, lambda tensors: tensors[f"model.{name}"][7].fill_(value))
    with pytest.raises(ValueError, match=rf"{folder}:model.{name}: weights must be finite"):
        load_tiny_stage(folder, int8=int8)


@pytest.mark.parametrize(
    "extra", ["v_head.summary.weight", "score.weight", "model.layers.3.mlp.up_proj.weight"]
)
def test_tensors_that_transformers_passes_over_are_named_in_a_warning(folder_of, caplog, extra):
    folder = folder_of("llama")
    before = load_tiny_stage(folder)
    rewrite(folder, lambda tensors: tensors.update({extra: torch.ones(3, 48)}))
    assert_same_stage(load_tiny_stage(folder), before)
    assert "1 tensor(s) that a llama model of this config.json does not have" in caplog.text
    assert extra in caplog.text


def test_a_config_with_fewer_blocks_than_the_checkpoint_loads_those(folder_of, caplog):
    folder = folder_of("llama")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert len(load_tiny_stage(folder).blocks) == 2
    assert "9 tensor(s)" in caplog.text


@pytest.mark.parametrize("kind", ["weight_scale_inv", "qzeros", "lora_A.default.weight"])
def test_what_changes_the_meaning_of_a_weight_is_refused(folder_of, kind):
    folder = folder_of("llama")
    name = f"model.layers.0.mlp.down_proj.{kind}"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(ValueError, match=f"1 problem.*unknown tensor {name}; these are quantized"):
        load_tiny_stage(folder)


def test_a_tensor_under_a_wrong_name_is_an_error_with_both_names(folder_of):
    folder = folder_of("llama")

    def rename(tensors):
        tensors["model.layers.0.mlp.up.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")

    rewrite(folder, rename)
    with pytest.raises(
        ValueError,
        match=r"missing tensor model\.layers\.0\.mlp\.up_proj\.weight.*"
        r"unknown tensor model\.layers\.0\.mlp\.up\.weight",
    ):
        load_tiny_stage(folder)


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("opt", "decoder.version"),
    ],
)
def test_buffers_of_old_checkpoints_are_ignored(folder_of, name, buffer):
    folder = folder_of(name)
    before = load_tiny_stage(folder)
    rewrite(folder, lambda tensors: tensors.update({buffer: torch.zeros(3)}))
    assert_same_stage(load_tiny_stage(folder), before)


def test_int8_weights_are_placed_in_the_order_a_step_reads_them(folder_of):
    folder = folder_of("llama_tied")
    stage = load_tiny_stage(folder)
    names = ("qkv", "attention_output", "gate_up", "down")
    layers = [getattr(stage.blocks[i], name) for i in "012" for name in names]
    weights = [layer._buffers["weight_int8"] for layer in layers]  # as the kernels read them
    for one, other in itertools.pairwise(weights):
        between = other.data_ptr() - (one.data_ptr() + one.nbytes)
        assert 0 <= between < 4096  # scales, norms
    floating = load_tiny_stage(folder, int8=False)
    weight = floating.blocks["0"].qkv.weight
    assert weight.untyped_storage().nbytes() == weight.nbytes


def test_a_config_with_a_byte_order_mark_loads(folder_of):
    folder = folder_of("llama")
    before = load_tiny_stage(folder)
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert_same_stage(load_tiny_stage(folder), before)
