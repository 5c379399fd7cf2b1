"""`convert`: which linears it swaps, on what devices, and what becomes of the floating weights."""

import gc
import weakref

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dist_int8
from dist_int8.int8.convert import convert
from dist_int8.int8.linear import Int8Linear


def a_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def swapped(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_modules() if isinstance(child, Int8Linear)}


def linears(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_modules() if isinstance(child, nn.Linear)}


@torch.inference_mode()
def test_a_transformers_model_still_computes_its_function():
    model, ids = a_llama(), torch.arange(40)[None]
    before, names = model(ids).logits, linears(model)
    assert convert(model, outlier_rule="row_rms", outlier_threshold=4.0) is model
    assert linears(model) == {"lm_head"}
    assert swapped(model) == names - {"lm_head"}
    layer = model.model.layers[1].mlp.down_proj
    assert (layer.outlier_rule, layer.outlier_threshold, layer.training) == ("row_rms", 4.0, False)
    after = model(ids).logits
    assert 0 < (after - before).norm() / before.norm() < 0.02


@torch.inference_mode()
def test_the_public_convert_keeps_the_logits_close_with_default_arguments():
    model, ids = a_llama(), torch.arange(40)[None]
    before = model(ids).logits
    assert dist_int8.convert(model) is model
    assert len(swapped(model)) == 2 * 7 and linears(model) == {"lm_head"}
    after = model(ids).logits
    assert 0 < (after - before).norm() / before.norm() < 0.02
    assert (after.argmax(-1) == before.argmax(-1)).float().mean() > 0.9


def test_skip_names_whole_components():
    model = a_llama()
    names = linears(model)
    convert(model, skip=("lm_head", "layers.0", "mlp.up_proj", "proj", "own"))
    kept = {n for n in names if n == "lm_head" or "layers.0." in n or n.endswith("mlp.up_proj")}
    assert linears(model) == kept
    assert swapped(model) == names - kept


def test_an_empty_skip_takes_the_head_too():
    model = convert(a_llama(), skip=())
    assert linears(model) == set()


def test_meta_linears_become_meta_layers():
    with init_empty_weights():
        model = LlamaForCausalLM(a_llama().config)
        convert(model)
    layers = [child for child in model.modules() if isinstance(child, Int8Linear)]
    assert len(layers) == 14
    assert all(layer.weight_int8.is_meta and layer.col_scale.is_meta for layer in layers)


def test_converting_twice_changes_nothing():
    model = convert(a_llama())
    layers = dict(model.named_modules())
    convert(model, outlier_rule="none")
    assert dict(model.named_modules()) == layers


def test_a_linear_under_two_names_stays_one_layer():
    model = nn.Module()
    model.first = nn.Linear(8, 8)
    model.rest = nn.Sequential(nn.ReLU(), model.first)
    convert(model)
    assert isinstance(model.first, Int8Linear)
    assert model.rest[1] is model.first


def test_subclasses_of_linear_are_left_alone():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    before = attention(x, x, x)[0]
    assert torch.equal(convert(attention)(x, x, x)[0], before)


def test_floating_weights_are_freed_one_by_one(monkeypatch):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    alive = [weakref.ref(child.weight) for child in model]
    seen: list[int] = []
    from_linear = Int8Linear.from_linear

    def counting(*args, **kwargs):
        gc.collect()
        seen.append(sum(ref() is not None for ref in alive))
        return from_linear(*args, **kwargs)

    monkeypatch.setattr(Int8Linear, "from_linear", counting)
    convert(model)
    assert seen == [4, 3, 2, 1]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"got a Linear; use Int8Linear\.from_linear"):
        convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"skip must be a list of names, got 'lm_head'"):
        convert(a_llama(), skip="lm_head")
    with pytest.raises(ValueError, match="outlier_rule must be one of"):
        convert(a_llama(), outlier_rule="some")
