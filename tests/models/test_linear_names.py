"""Lists of linears that stay floating, by our names and the checkpoint's."""

import pytest
from tiny_models import make_config

from dist_int8.models import describe, resolve_skip


@pytest.mark.parametrize(
    ("family", "skip", "resolved"),
    [
        ("llama", ["lm_head"], ("lm_head",)),
        ("llama", ["blocks.1", "qkv", "mlp.down_proj"], ("blocks.1", "qkv", "down")),
        ("llama", ["o_proj"], ("attention_output",)),
        ("llama", ["mlp"], ("gate_up", "down")),
        (
            "llama",
            ["model.layers.1.self_attn"],
            ("blocks.1.qkv", "blocks.1.attention_output"),
        ),
        (
            "bloom",
            ["query_key_value", "h.0"],
            ("qkv", *(f"blocks.0.{name}" for name in ("qkv", "attention_output", "up", "down"))),
        ),
        ("opt", ["fc1", "out_proj"], ("up", "attention_output")),
        ("gpt_neox", ["embed_out", "dense"], ("lm_head", "attention_output")),
        ("llama", [], ()),
    ],
)
def test_names_of_the_checkpoint_are_translated(family, skip, resolved):
    assert resolve_skip(describe(make_config(family)), skip, "skip_modules") == resolved


def test_part_of_a_fused_matrix_keeps_all_of_it_floating_and_says_so(caplog):
    spec = describe(make_config("llama"))
    assert resolve_skip(spec, ["k_proj"], "--skip") == ("qkv",)
    assert "--skip: 'k_proj' is part of qkv, which stays in floating point as" in caplog.text
    caplog.clear()
    assert resolve_skip(spec, ["layers.2.mlp.up_proj"], "--skip") == ("blocks.2.gate_up",)
    assert "is part of blocks.2.gate_up" in caplog.text
    caplog.clear()
    resolve_skip(spec, ["self_attn"], "--skip")
    assert not caplog.text


@pytest.mark.parametrize("name", ["nope", "q_pro", "layers.9", "embed_tokens", "blocks.3"])
def test_a_name_of_no_linear_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=rf"skip: must name linears .*qkv.*q_proj.*, got '{name}'"):
        resolve_skip(describe(make_config("llama")), [name], "skip")
