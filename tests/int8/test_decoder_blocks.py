"""The op of several blocks: arguments that it refuses (results: tests/models/test_blocks.py)."""

from itertools import chain

import pytest
import torch

from dist_int8.int8 import ops, packing, reference
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.decoder_blocks import BlockSettings, BlockTensors, LinearRule, PreparedBlocks

HIDDEN, INNER, HEAD_DIM, TOKENS = 32, 24, 16, 8
SETTINGS = BlockSettings(
    norm_eps=1e-5,
    norm_kind="rms",
    linears=LinearRule("row_rms", 4.0, rotation=0),
    attention=AttentionArgs(num_heads=2, num_kv_heads=1, scale=0.25),
)


def tensors(**changes):
    """The tensors of a block, by name, as BlockTensors."""
    named = {"norm": torch.ones(HIDDEN), "key_cache": torch.zeros(1, 1, HEAD_DIM, TOKENS)}
    shapes = {"qkv": (64, HIDDEN), "attention_output": (HIDDEN, 32), "gate_up": (48, HIDDEN)}
    for name, (rows, columns) in {**shapes, "down": (HIDDEN, INNER)}.items():
        named[name], named[f"{name}_scale"] = reference.quantize_weight(torch.randn(rows, columns))
    named |= {"value_cache": torch.zeros(1, 1, TOKENS, HEAD_DIM), "bias": None} | changes
    linears = []
    for name in ("qkv", "attention_output", "gate_up", "down"):
        linears += [named[name], named[f"{name}_scale"], named["bias"], None, None]
    norms = [named["norm"], None, named["norm"], None]
    return BlockTensors(norms, linears, [named["key_cache"], named["value_cache"]])


def run(*blocks, x=None, residual=None, segments=((0, 0, 3),), **changes):
    x = torch.randn(3, HIDDEN) if x is None else x
    where = torch.tensor(segments, dtype=torch.int32)
    joined = BlockTensors(*(list(chain.from_iterable(part)) for part in zip(*blocks, strict=True)))
    prepared = PreparedBlocks(x, joined, SETTINGS._replace(**changes))
    return prepared.run(x, residual, where)


def test_a_residual_counts_as_if_it_had_been_added():
    x, residual = torch.randn(2, 3, HIDDEN)
    torch.manual_seed(0)
    block = tensors()
    got = run(block, x=x, residual=residual)
    expected = run(block, x=x + residual)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def gated_mlp(inner, is_packed):
    """Tensors of an MLP with hot columns and biases, packed or not."""
    hot_columns = torch.tensor([3, 14], dtype=torch.int32)
    linears, shapes = {}, {"gate_up": (2 * inner, HIDDEN), "down": (HIDDEN, inner)}
    for name, (rows, columns) in shapes.items():
        weight, scale = reference.quantize_weight(torch.randn(rows, columns))
        hot_weight = torch.randn(rows, 2).bfloat16()
        if is_packed:
            weight, hot_weight = packing.pack_(weight, packing.GROUP), packing.pack_(hot_weight, 1)
        linears[name] = [weight, scale, torch.randn(rows), hot_columns, hot_weight]
    return linears


# Inner features of one strip, of a panel and a part of one, and such that cut a strip in two.
@pytest.mark.parametrize("rule", [("none", 0.0), ("row_rms", 4.0)])
@pytest.mark.parametrize(
    ("tokens", "inner", "is_packed"),
    [
        (1, 16, True),
        (1, 80, True),
        (3, 80, False),
        (40, 176, True),
        (9, 40, False),
        (700, 4096, True),
    ],
)
def test_blocks_are_one_op_after_the_other(tokens, inner, is_packed, rule):
    """Also where the halves of an MLP meet within a linear, and rows go through in chunks."""
    mlp = gated_mlp(inner, is_packed)
    block = tensors(
        key_cache=torch.zeros(1, 1, HEAD_DIM, tokens),
        value_cache=torch.zeros(1, 1, tokens, HEAD_DIM),
    )
    linears = [block.linears[5 * i : 5 * i + 5] for i in range(2)] + list(mlp.values())
    block = block._replace(linears=list(chain.from_iterable(linears)))
    x = torch.randn(tokens, HIDDEN)
    whole = ((0, 0, tokens),)
    kind = LinearRule(*rule, rotation=8)
    got, total = run(block, x=x, segments=whole, linears=kind)

    def linear(x, index):
        weight, scale, bias, hot_columns, hot_weight = linears[index]
        hot = {"hot_columns": hot_columns, "hot_weight": hot_weight}
        return ops.int8_linear(x, weight, scale, bias, **kind._asdict(), **hot)

    caches = [cache.zero_() for cache in block.caches]
    norm = block.norms[0]
    qkv = linear(ops.add_norm(x, None, norm, None, 1e-5, "rms")[0], 0)
    where = torch.tensor(whole, dtype=torch.int32)
    projected = linear(ops.attention(qkv, *caches, where, SETTINGS.attention), 1)
    normed, expected_total = ops.add_norm(projected, x, norm, None, 1e-5, "rms")
    assert torch.equal(got, linear(ops.silu_mul(linear(normed, 2)), 3))
    assert torch.equal(total, expected_total)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm": torch.ones(5)}, r"add_norm: weight must be \[K=32\], got \[5\]"),
        ({"qkv": torch.ones(64, 9, dtype=torch.int8)}, r"weight_int8 must be \[N, K=32\]"),
        ({"down": torch.ones(HIDDEN, 9, dtype=torch.int8)}, r"weight_int8 must be \[N, K=24\]"),
        ({"down_scale": torch.ones(3)}, r"col_scale must be \[N=32\], got \[3\]"),
        ({"gate_up": torch.ones(48, HIDDEN)}, "weight_int8 must be int8, got float32"),
        ({"bias": torch.ones(5)}, r"bias must be \[N=64\]"),
        ({"bias": torch.ones(0)}, r"bias must be \[N=64\], got \[0\]"),
        ({"key_cache": torch.zeros(1, 2, HEAD_DIM, TOKENS)}, r"key_cache must be \[S, KV=1"),
        ({"value_cache": torch.zeros(1, 1, TOKENS, 5)}, r"value_cache must be \[S=1"),
    ],
)
def test_bad_tensors(change, message):
    with pytest.raises(ValueError, match=message):
        run(tensors(), tensors(**change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"segments": ((0, 6, 3),)}, r"segments\[0\] positions must be in 0..7, got 6..8"),
        ({"segments": ((0, 0, 2),)}, "segments must cover T=3 tokens"),
        ({"residual": torch.ones(2, HIDDEN)}, r"residual must be \[T=3, K=32\]"),
        ({"norm_kind": "batch"}, "kind must be 'rms' or 'layer', got 'batch'"),
        ({"linears": LinearRule("most", 4.0, 0)}, "most"),
        (
            {"linears": LinearRule("all", float("nan"), 0)},
            "outlier_threshold must be a finite number",
        ),
        ({"linears": LinearRule("none", 0.0, 48)}, "rotation must be 0 or a power of two"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        run(tensors(), **change)


@pytest.mark.parametrize(
    "count, message", [(0, "norms must be of 1 block"), (3, "linears must be")]
)
def test_bad_counts(count, message):
    op = torch.ops.dist_int8.prepare_blocks.default
    none = torch.empty(0, dtype=torch.bool)
    settings = (False, 1, 1, 1.0, None, None, None, 0, 1e-5, 0, 0, 0.0)
    with pytest.raises(ValueError, match=f"^prepare_blocks: {message}"):
        op(torch.ones(1, 4), 4, [none] * 4 * count, [none] * 7, [none] * 6, *settings)


def test_caches_of_other_sizes_are_refused():
    small = {"key_cache": torch.zeros(1, 1, HEAD_DIM, 5), "value_cache": torch.zeros(1, 1, 5, 16)}
    with pytest.raises(ValueError, match=r"must have the same slots and positions .* in block 1"):
        run(tensors(), tensors(**small))


def test_a_block_must_return_to_the_width_of_x():
    wide = {"down": torch.ones(2 * HIDDEN, INNER, dtype=torch.int8), "down_scale": torch.ones(64)}
    with pytest.raises(ValueError, match="down must have the K=32 outputs of x, got 64"):
        run(tensors(**wide))


@pytest.mark.parametrize("prepared", [torch.zeros(0), torch.zeros(5), torch.zeros(100_000)])
def test_other_bytes_are_refused(prepared):
    x, where = torch.randn(3, HIDDEN), torch.tensor([[0, 0, 3]], dtype=torch.int32)
    with pytest.raises(ValueError, match="prepared must be what prepare_blocks makes"):
        torch.ops.dist_int8.decoder_blocks(x, None, where, prepared.byte())


def test_prepared_blocks_know_their_tensors():
    block = tensors()
    prepared = PreparedBlocks(torch.randn(3, HIDDEN), block, SETTINGS)
    assert prepared.are_of(block, SETTINGS)
    assert not prepared.are_of(tensors(), SETTINGS)
    rotated = SETTINGS._replace(attention=SETTINGS.attention._replace(cos=torch.ones(8, 4)))
    assert not prepared.are_of(block, rotated)
    block.norms[0].data = torch.ones(HIDDEN)  # as nn.Module.to does
    assert not prepared.are_of(block, SETTINGS)
