"""Neighbouring decoder blocks in one call on CPUs, where a token's work is short.

The eight ops of a block, called one by one from Python, take about 0.05 ms longer than their work:
6 to 20% of a decoding step of SmolLM2-135M. The compiled op runs the same kernels in the same
order, so its result is the same, bit for bit.
"""

from collections.abc import Iterator
from itertools import chain
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from dist_int8.int8 import ops
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.library import load
from dist_int8.int8.registry import has_kernel

_OPS = torch.ops.dist_int8 if load() and has_kernel("prepare_blocks", "CPU") else None
_NONE = torch.empty(0, dtype=torch.bool)  # a list of tensors has no place for None


class BlockTensors(NamedTuple):
    """What the op reads, block after block, in the order in which it takes it.

    Attributes:
        norms: weight and bias (or None) of the first norm, then of the second.
        linears: weight_int8, col_scale, bias, hot_columns, hot_weight (the last three or None) of
            qkv, then of attention_output, gate_up and down.
        caches: key_cache and value_cache of `ops.attention`, changed in place; or, of
            `Int8KV`, values and scale of both.
    """

    norms: list[Tensor | None]
    linears: list[Tensor | None]
    caches: list[Tensor]


def runs(x: Tensor) -> bool:
    """Whether the op is compiled for x: fp32 on a CPU, as its attention is."""
    return _OPS is not None and x.is_cpu and x.dtype == torch.float32


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


class PreparedBlocks:
    """Neighbouring blocks with gated MLPs, checked once and run again and again.

    A block is `ops.add_norm`, `int8_linear` (qkv), `attention`, `int8_linear` (attention_output),
    `add_norm`, `int8_linear` (gate_up), `silu_mul`, `int8_linear` (down).

    The op keeps the addresses of the tensors, which are therefore kept here. Another memory for one
    of them, which `nn.Module.to` gives to parameters, needs new `PreparedBlocks`: see `are_of`.

    Args:
        x: of the shape and device of what will be run.
        tensors: of one block or more, of the same sizes and kind of cache.
        settings: of all of them.

    Raises ValueError as the ops do, the name of the op first. Make it where `runs(x)`.
    """

    def __init__(self, x: Tensor, tensors: BlockTensors, settings: BlockSettings) -> None:
        assert _OPS is not None, "runs(x) says where it is compiled"
        norms, linears, caches = tensors
        self._kept = [*_all_of(tensors, settings)]
        self._norm_addresses = _addresses(norms)
        self._prepared = _OPS.prepare_blocks.default(
            x,
            x.shape[1],
            [_NONE if tensor is None else tensor for tensor in norms],
            [_NONE if tensor is None else tensor for tensor in linears],
            caches,
            len(caches) == len(norms),  # as many where keys and values have scales
            *settings.attention,
            settings.norm_eps,
            ops.norm_kind_index("decoder_blocks", settings.norm_kind),
            ops.rule_index(settings.linears.outlier_rule, settings.linears.outlier_threshold),
            settings.linears.outlier_threshold,
            settings.linears.rotation,
        )

    def are_of(self, tensors: BlockTensors, settings: BlockSettings) -> bool:
        """Whether they were made of these very tensors, where these are now."""
        found = [*_all_of(tensors, settings)]
        return (
            len(found) == len(self._kept)
            and all(map(is_, found, self._kept))
            and _addresses(tensors.norms) == self._norm_addresses
        )

    def run(self, x: Tensor, residual: Tensor | None, segments: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual [T, hidden] through the blocks -> the next (x, residual).

        Args:
            x: fp32 [T, hidden].
            residual: fp32 [T, hidden], or None.
            segments: as of `ops.attention`.
        """
        assert _OPS is not None
        return _OPS.decoder_blocks.default(x, residual, segments, self._prepared)


def _all_of(tensors: BlockTensors, settings: BlockSettings) -> Iterator[Tensor | None]:
    attention = settings.attention
    return chain(*tensors, (attention.cos, attention.sin, attention.alibi_slopes))


def _addresses(norms: list[Tensor | None]) -> list[int]:
    return [tensor.data_ptr() for tensor in norms if tensor is not None]
