"""Injected outlier features: the same function in fp32, large features, hard for naive int8."""

import copy

import pytest
import torch
from tiny_models import make_config
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig

import dist_int8
from dist_int8.evaluation.outlier_features import inject_outlier_features
from dist_int8.int8.convert import convert

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
}
CONFIGS = {
    "llama": make_config("llama", **SIZES, num_key_value_heads=2),
    "mistral": make_config("mistral", **SIZES, num_key_value_heads=2),
    "qwen2": make_config("qwen2", **SIZES, num_key_value_heads=2),
    "opt": make_config("opt", **SIZES, word_embed_proj_dim=64),
    "bloom": make_config("bloom", **SIZES),
    "gpt_neox": make_config("gpt_neox", **SIZES),
}


def a_model(config: PretrainedConfig) -> torch.nn.Module:
    """A random model whose norms have gains and biases that are not all alike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter += 0.3 * torch.randn_like(parameter)
            elif "bias" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    return a_model(CONFIGS[request.param])


IDS = torch.arange(48).view(2, 24)


@torch.inference_mode()
def test_logits_stay_bit_for_bit_and_the_features_grow(model):
    before = model(IDS).logits
    outputs: dict[str, torch.Tensor] = {}

    def record(name):
        def hook(module, inputs, output):
            outputs[name] = output.abs().flatten(0, -2).amax(dim=0)

        return hook

    plain = copy.deepcopy(model)
    channels = inject_outlier_features(model, seed=0)
    assert len(channels) == 4
    sizes = []
    for which in (plain, model):
        for name in channels:
            which.get_submodule(name).register_forward_hook(record(name))
        logits = which(IDS).logits
        sizes.append(dict(outputs))
    assert torch.equal(logits, before)
    for name, columns in channels.items():
        growth = sizes[1][name] / sizes[0][name]
        assert len(columns.unique()) == 6
        expected = torch.ones(64)
        expected[columns] = 32.0
        assert torch.equal(growth, expected)


@torch.inference_mode()
def test_logits_stay_bit_equal_in_bfloat16(model):
    model = model.to(torch.bfloat16)
    before = model(IDS).logits
    inject_outlier_features(model, seed=3)
    assert torch.equal(model(IDS).logits, before)


@torch.inference_mode()
def test_outlier_features_hurt_naive_int8_but_not_two_planes(model):
    before = model(IDS).logits

    def error(rule: str, threshold: float) -> float:
        converted = convert(copy.deepcopy(model), outlier_rule=rule, outlier_threshold=threshold)
        return float((converted(IDS).logits - before).norm() / before.norm())

    plain = error("none", 0.0)
    inject_outlier_features(model, seed=1)
    injected = error("none", 0.0)
    assert injected > 3 * plain
    assert (
        error("all", 0.0) < injected / 1.3
    )  # what is left is the rounding of the shrunken columns


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "opt"])
def test_features_inside_the_mlp(family):
    model = a_model(CONFIGS[family])
    before = model(IDS).logits
    plain = copy.deepcopy(model)
    channels = inject_outlier_features(model, seed=0, mlp=True)
    inside = [name for name in channels if name.endswith(("mlp.up_proj", "fc1"))]
    assert len(channels) == 6 and len(inside) == 2
    assert torch.equal(model(IDS).logits, before)
    for name in inside:
        reader = name.replace("up_proj", "down_proj").replace("fc1", "fc2")
        shrunken, was = model.get_submodule(reader).weight, plain.get_submodule(reader).weight
        assert torch.equal(32.0 * shrunken[:, channels[name]], was[:, channels[name]])
        assert len(channels[name].unique()) == 6
    norms = inject_outlier_features(plain, seed=0)
    assert len(norms) == 4


def test_seed_determines_the_features():
    features = [inject_outlier_features(a_model(CONFIGS["llama"]), seed) for seed in (0, 0, 1)]
    for name, columns in features[0].items():
        assert torch.equal(columns, features[1][name])
        assert not torch.equal(columns, features[2][name])
    assert not torch.equal(*list(features[0].values())[:2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128), "got gpt2"),
        (
            make_config("opt", **SIZES, word_embed_proj_dim=64, do_layer_norm_before=False),
            "got a opt with norms in the residual stream",
        ),
        (
            make_config("bloom", **SIZES, apply_residual_connection_post_layernorm=True),
            "got a bloom with norms in the residual stream",
        ),
    ],
)
def test_unsupported_models_are_refused(config, message):
    model = AutoModelForCausalLM.from_config(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        inject_outlier_features(model, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_mlp_features_are_refused_with_gelu():
    for family in ("bloom", "gpt_neox"):
        with pytest.raises(ValueError, match=f"mlp must be False for {family}"):
            inject_outlier_features(a_model(CONFIGS[family]), seed=0, mlp=True)
    opt = make_config("opt", **SIZES, word_embed_proj_dim=64, activation_function="gelu")
    with pytest.raises(ValueError, match="mlp must be False for opt"):
        inject_outlier_features(a_model(opt), seed=0, mlp=True)


def test_inject_outlier_features_is_public():
    assert dist_int8.inject_outlier_features is inject_outlier_features
