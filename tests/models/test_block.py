"""Activations of the block: the right function, and the same bits at any place in memory."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import bloom_gelu_forward

from dist_int8.int8 import ops
from dist_int8.int8.activations import ACTIVATIONS
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.block import DecoderBlock, PositionTables
from dist_int8.models.spec import BlockSpec

TRANSFORMERS = {
    "relu": ACT2FN["relu"],
    "gelu": ACT2FN["gelu"],
    "gelu_tanh": ACT2FN["gelu_new"],
    "bloom_gelu": bloom_gelu_forward,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_transformers(name):
    x = torch.linspace(-8, 8, 4001)
    torch.testing.assert_close(ACTIVATIONS[name](x), TRANSFORMERS[name](x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_batch_invariant(name, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for width in (100, 256, 1001):
            x = torch.randn(301, width, generator=torch.Generator().manual_seed(0)) * 3
            whole = ACTIVATIONS[name](x)
            for start, stop in ((0, 1), (5, 6), (7, 10), (3, 301), (100, 117)):
                assert torch.equal(ACTIVATIONS[name](x[start:stop].clone()), whole[start:stop])
    finally:
        torch.set_num_threads(before)


# The quantizing path of GPUs, run on the CPU: the same bits as the path that CPUs take.
BLOCKS = {
    "llama": {"norm": "rms", "gated": True, "num_kv_heads": 2},
    "bloom": {"norm": "layer", "activation": "bloom_gelu", "qkv_bias": True, "mlp_bias": True},
    "gpt_neox": {"norm": "layer", "activation": "gelu", "parallel_residual": True},
    "opt_350m": {"norm": "layer", "activation": "relu", "norm_after": True, "mlp_bias": True},
    "residual_from_norm": {
        "norm": "layer",
        "activation": "bloom_gelu",
        "residual_from_norm": True,
    },
}


def int8_block(dtype, hot_columns=None, **changes):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_heads": 4, "num_kv_heads": 4}
    spec = BlockSpec(**{**sizes, "head_dim": 16, "norm_eps": 1e-5, **changes})
    block = DecoderBlock(spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(generator=generator)
    for name, child in list(block.named_children()):
        if isinstance(child, nn.Linear):
            layer = Int8Linear.from_linear(child, 4.0, "row_rms", hot_columns)
            setattr(block, name, layer)
    return block.to(dtype)


def two_steps(block, dtype):
    """Hidden states after a prefill of two sequences and one step of decoding."""
    spec = block.spec
    caches = (
        torch.zeros(2, spec.num_kv_heads, spec.head_dim, 32, dtype=dtype),
        torch.zeros(2, spec.num_kv_heads, 32, spec.head_dim, dtype=dtype),
    )
    generator = torch.Generator().manual_seed(1)
    results = []
    for segments in ([(0, 0, 5), (1, 0, 3)], [(0, 5, 1), (1, 3, 1)]):
        num_tokens = sum(count for _, _, count in segments)
        x = torch.randn(num_tokens, spec.hidden_size, generator=generator).to(dtype)
        residual = torch.randn(num_tokens, spec.hidden_size, generator=generator).to(dtype)
        x[:, 7] *= 30
        tables = PositionTables(None, None, torch.tensor([0.5, 0.25, 0.125, 0.0625]))
        where = torch.tensor(segments, dtype=torch.int32)
        results += block(x, residual, where, *caches, tables)
    return results


@pytest.mark.parametrize("hot_columns", [None, [3, 7]], ids=["no-hot", "hot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BLOCKS)
def test_norms_that_quantize_give_the_same_bits(name, dtype, hot_columns, monkeypatch):
    block = int8_block(dtype, hot_columns, **BLOCKS[name])
    expected = two_steps(block, dtype)
    quantized = []
    matmul = ops.int8_matmul
    monkeypatch.setattr(ops, "int8_matmul", lambda *a, **k: quantized.append(1) or matmul(*a, **k))
    monkeypatch.setattr("dist_int8.models.block.FUSED_DEVICES", {"cpu"})
    for got, want in zip(two_steps(block, dtype), expected, strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)
    from_norms = 0 if BLOCKS[name].keys() & {"norm_after", "residual_from_norm"} else 2
    others = 2  # attention and the activation
    assert len(quantized) == 2 * (from_norms + others)


def test_a_floating_linear_gets_rows_that_are_not_quantized(monkeypatch):
    monkeypatch.setattr("dist_int8.models.block.FUSED_DEVICES", {"cpu"})
    block = int8_block(torch.float32, **BLOCKS["llama"])
    block.qkv = nn.Linear(64, block.spec.qkv_size, bias=False).requires_grad_(False)
    assert two_steps(block, torch.float32)[0].isfinite().all()
