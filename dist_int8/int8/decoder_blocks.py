"""Neighbouring decoder blocks in one call on CPUs, where a token's work is short.

The eight ops of a block, called one by one from Python, take about 0.05 ms longer than their work:
6 to 20% of a decoding step of SmolLM2-135M. The compiled op runs the same kernels in the same
order, so its result is the same, bit for bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_int8.int8 import ops
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.library import load
from dist_int8.int8.registry import has_kernel

_decoder_blocks = (
    torch.ops.dist_int8.decoder_blocks.default
    if load() and has_kernel("decoder_blocks", "CPU")
    else None
)
_NONE = torch.empty(0, dtype=torch.bool)  # a list of tensors has no place for None


class BlockTensors(NamedTuple):
    """What the op reads, block after block, in the order in which it takes it.

    Attributes:
        norms: weight and bias (or None) of the first norm, then of the second.
        linears: weight_int8, col_scale, bias, hot_columns, hot_weight (the last three or None) of
            qkv, then of attention_output, gate_up and down.
        caches: key_cache and value_cache of `ops.attention`, changed in place; or, of
            `kv.attention`, values and scale of both.
    """

    norms: list[Tensor | None]
    linears: list[Tensor | None]
    caches: list[Tensor]


def runs(x: Tensor) -> bool:
    """Whether the op is compiled for x: fp32 on a CPU, as its attention is."""
    return _decoder_blocks is not None and x.is_cpu and x.dtype == torch.float32


class LinearRule(NamedTuple):
    """How rows are quantized for every linear of a call: see `reference.quantize_rows`."""

    outlier_rule: str
    outlier_threshold: float
    rotation: int


class BlockSettings(NamedTuple):
    """What the blocks of one call have in common.

    Attributes:
        norm_kind: as of `ops.add_norm`, of all norms.
    """

    norm_eps: float
    norm_kind: str
    linears: LinearRule
    attention: AttentionArgs


def decoder_blocks(
    x: Tensor,
    residual: Tensor | None,
    segments: Tensor,
    blocks: BlockTensors,
    settings: BlockSettings,
) -> tuple[Tensor, Tensor]:
    """x + residual [T, hidden] through blocks with gated MLPs -> the next (x, residual).

    A block is `ops.add_norm`, `int8_linear` (qkv), `attention`, `int8_linear` (attention_output),
    `add_norm`, `int8_linear` (gate_up), `silu_mul`, `int8_linear` (down).

    Args:
        x: fp32 [T, hidden].
        residual: fp32 [T, hidden], or None.
        segments: as of `ops.attention`.
        blocks: one or more, of the same sizes and kind of cache.
        settings: of all of them.

    Raises ValueError as the ops do, the name of the op first. Call it where `runs(x)`.
    """
    assert _decoder_blocks is not None, "runs(x) says where it is compiled"
    norms, linears, caches = blocks
    return _decoder_blocks(
        x,
        residual,
        segments,
        [_NONE if tensor is None else tensor for tensor in norms],
        [_NONE if tensor is None else tensor for tensor in linears],
        caches,
        len(caches) == len(norms),  # keys, values and their scales; norms: two weights and biases
        *settings.attention,
        settings.norm_eps,
        ops.norm_kind_index("decoder_blocks", settings.norm_kind),
        ops.rule_index(settings.linears.outlier_rule, settings.linears.outlier_threshold),
        settings.linears.outlier_threshold,
        settings.linears.rotation,
    )
