"""Runs the blocks of a stage, neighbours in one call where `int8/decoder_blocks.py` has them."""

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from dist_int8.int8 import ops
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.decoder_blocks import BlockSettings, BlockTensors, PreparedBlocks, runs
from dist_int8.int8.kv import Cache, list_tensors
from dist_int8.models.block import DecoderBlock, PositionTables
from dist_int8.models.block_calls import BlockCall, BlockCalls

Hidden = tuple[Tensor, Tensor | None]  # (x, residual); their sum is the hidden state
Caches = tuple[Cache, Cache]  # of keys and of values


def run_blocks(
    blocks: Iterable[DecoderBlock],
    x: Tensor,
    segments: ops.Segments,
    caches_of: Callable[[int], Caches],
    tables: PositionTables,
    calls: BlockCalls,
) -> Hidden:
    """Runs x [T, hidden] through blocks, whose caches are `caches_of(0)`, ... -> (x, residual).

    `calls` is of these blocks, and kept by who runs them again and again.
    """
    residual: Tensor | None = None
    blocks = tuple(blocks)
    caches = [caches_of(index) for index in range(len(blocks))]
    # torch.compile and hooks on all modules want to see the ops and the modules.
    if not runs(x) or torch.compiler.is_compiling() or _has_any_global_hook():
        return _one_by_one(blocks, caches, x, residual, segments, tables)
    first = 0
    for call in calls.of(blocks):
        some = caches[first : first + len(call.blocks)]
        first += len(call.blocks)
        if call.rule is None:
            x, residual = _one_by_one(call.blocks, some, x, residual, segments, tables)
        else:
            x, residual = _in_one_call(call, some, x, residual, segments, tables)
    return x, residual


def _one_by_one(
    blocks: Iterable[DecoderBlock],
    caches: Iterable[Caches],
    x: Tensor,
    residual: Tensor | None,
    segments: ops.Segments,
    tables: PositionTables,
) -> Hidden:
    for block, cache in zip(blocks, caches, strict=True):
        x, residual = block(x, residual, segments, *cache, tables)
    return x, residual


def _in_one_call(
    call: BlockCall,
    caches: Iterable[Caches],
    x: Tensor,
    residual: Tensor | None,
    segments: ops.Segments,
    tables: PositionTables,
) -> Hidden:
    assert call.rule is not None
    spec, scale, norm_kind, norm_eps, linear_rule = call.rule
    attention = AttentionArgs(spec.num_heads, spec.num_kv_heads, scale, *tables, window=spec.window)
    settings = BlockSettings(norm_eps, norm_kind, linear_rule, attention)
    flat = chain.from_iterable(list_tensors(*cache) for cache in caches)
    tensors = BlockTensors(call.norm_tensors(), call.linear_tensors(), list(flat))
    if call.prepared is None or not call.prepared.are_of(tensors, settings):
        call.prepared = PreparedBlocks(x, tensors, settings)
    return call.prepared.run(x, residual, segments.rows)
