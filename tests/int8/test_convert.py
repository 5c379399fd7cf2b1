"""`convert`: which linears it swaps, on what devices, and what becomes of the floating weights."""

import copy
import gc
import weakref

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

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
    convert(model, skip=("lm_head", "layers.0", "mlp.up_proj"))
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


@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ],
    ids=["falcon", "gpt2"],
)
@torch.inference_mode()
def test_linears_of_other_classes_compute_the_dequantized_function(config, caplog):
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(40)[None]
    dequantized = copy.deepcopy(model)
    convert(model, outlier_rule="all")  # no rounding of x to speak of
    assert len(swapped(model)) == 2 * 4 and not caplog.records
    for name in swapped(model):
        layer, floating = model.get_submodule(name), dequantized.get_submodule(name)
        weight = layer.dequantize()
        floating.weight.copy_(weight.T if type(floating).__name__ == "Conv1D" else weight)
    expected = dequantized(ids).logits
    assert (model(ids).logits - expected).norm() / expected.norm() < 1e-4
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 43)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 32, 16))
        self.scale = nn.Parameter(torch.ones(32))


def linears_left_alone() -> dict[str, nn.Module]:
    """What is linear-like but not swapped, by what the message has to say of it."""
    hooked = nn.Linear(16, 16)
    hooked.register_forward_hook(lambda module, inputs, output: output)
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    bitsandbytes = pytest.importorskip("bitsandbytes")
    int8 = bitsandbytes.nn.Linear8bitLt(16, 16, has_fp16_weights=False)
    return {
        "Doubling, may do more": Doubling(16, 16),
        "ParametrizedLinear, may do more": weight_norm,
        "Linear, has hooks": hooked,
        "NonDynamicallyQuantizableLinear, may do more": nn.MultiheadAttention(16, 2),
        "Experts, may do more": Experts(),
        "LSTM, may do more": nn.LSTM(16, 16),
        "Linear8bitLt, may do more": int8,
    }


def test_what_is_left_alone_is_named(caplog):
    for message, child in linears_left_alone().items():
        caplog.clear()
        alone = nn.ModuleDict({"odd": child, "table": nn.Embedding(64, 32)})
        kept = dict(alone.named_modules())
        with pytest.raises(
            ValueError, match=f"must contain linears to swap, got none; .*{message}"
        ):
            convert(alone)
        assert dict(alone.named_modules()) == kept
        beside = nn.ModuleDict({"odd": child, "linear": nn.Linear(16, 16)})
        assert swapped(convert(beside)) == {"linear"}
        assert message in caplog.text and "left as it is: odd" in caplog.text
        assert beside["odd"] is child


def test_a_module_without_matrices_is_refused():
    with pytest.raises(ValueError, match="Sequential must contain linears to swap, got none"):
        convert(nn.Sequential(nn.ReLU(), nn.LayerNorm(32), nn.Conv2d(16, 16, 16)))


def test_long_lists_are_cut(caplog):
    convert(nn.Sequential(nn.Linear(4, 4), *(Doubling(4, 4) for _ in range(5))))
    assert "left as it is: 1, 2, 3 and 2 more (Doubling, may do more" in caplog.text


def test_adapters_stay_and_their_base_layer_is_swapped(caplog):
    class Lora(nn.Module):  # what peft's layers declare
        adapter_layer_names = ("lora_A", "lora_B")

        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})

    model = nn.Sequential(Lora())
    assert swapped(convert(model)) == {"0.base_layer"}
    assert "0.lora_A.default, 0.lora_B.default (Linear, adapters)" in caplog.text


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
    with pytest.raises(ValueError, match=r"skip must name modules of LlamaForC.*, got 'up_pro'"):
        convert(a_llama(), skip=["lm_head", "up_pro"])
    with pytest.raises(ValueError, match=r"names of linears that are swapped, got 'lm_head'"):
        convert(a_llama(), hot_columns={"lm_head": [1]})


def test_nothing_is_swapped_where_one_linear_cannot_be():
    name = "model.layers.1.mlp.up_proj"
    model = a_llama()
    with pytest.raises(ValueError, match=r"hot_columns must be input features 0 .. 31, got \[99\]"):
        convert(model, hot_columns={name: [99]})
    model.get_submodule(name).double()
    with pytest.raises(ValueError, match=rf"{name}.weight must be float32, .*got torch.float64"):
        convert(model)
    assert swapped(model) == set()
    assert len(swapped(convert(model, skip=["lm_head", name]))) == 13
