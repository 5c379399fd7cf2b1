"""Position tables against transformers' own."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dist_int8.models.rotary import alibi_slopes, describe_rotary, make_rotary_tables

VARIANTS = {
    "default": {"rope_theta": 500.0},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0 + i / 10 for i in range(16)],
        "long_factor": [2.0 + i / 10 for i in range(16)],
        "original_max_position_embeddings": 200,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tables_equal_transformers(variant):
    parameters = {"rope_theta": 10000.0, **VARIANTS[variant], "rope_type": variant}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters=parameters,
    )
    rotary, max_positions = describe_rotary(config, 32, 256)
    cos, sin = make_rotary_tables(rotary, max_positions)
    positions = torch.arange(max_positions)[None]
    wanted_cos, wanted_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    assert cos.dtype == torch.float32
    assert torch.equal(torch.cat([cos, cos], dim=-1), wanted_cos[0])
    assert torch.equal(torch.cat([sin, sin], dim=-1), wanted_sin[0])


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 40, 112])
def test_slopes_equal_transformers(num_heads):
    alibi = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)
    assert torch.equal(alibi_slopes(num_heads), alibi[:, 0, 1])


@pytest.mark.parametrize(
    ("variant", "parameters", "wanted"),
    [
        ("default", {}, 64),
        ("linear", {"factor": 4.0}, 256),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ("yarn", {"factor": 4.0}, 256),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ("yarn", {"factor": 2.0, "original_max_position_embeddings": 16}, 64),
        ("llama3", {**VARIANTS["llama3"], "original_max_position_embeddings": 16}, 64),
        ("dynamic", {"factor": 4.0}, 64),
        ("longrope", {**VARIANTS["longrope"], "original_max_position_embeddings": 32}, 32),
    ],
)
def test_positions_are_those_that_the_rope_is_made_for(variant, parameters, wanted):
    # what vLLM derives, except that dynamic and longrope end where frequencies would change
    rope = {"rope_theta": 10000.0, **parameters, "rope_type": variant}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope
    )
    rotary, max_positions = describe_rotary(config, 32, 64)
    assert max_positions == wanted
    if variant in ("linear", "yarn", "llama3"):  # exact beyond max_position_embeddings
        cos, _ = make_rotary_tables(rotary, 4 * wanted)
        positions = torch.arange(4 * wanted)[None]
        expected, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
        assert torch.equal(torch.cat([cos, cos], dim=-1), expected[0])


def test_parameters_that_give_no_frequencies_are_refused():
    rope = {"rope_theta": 1.0, "factor": 4.0, "rope_type": "yarn"}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope
    )
    with pytest.raises(ValueError, match="must be complete and consistent for 'yarn'"):
        describe_rotary(config, 32, 64)
