"""Runs the blocks of a stage, neighbours in one call where `int8/decoder_blocks.py` has them."""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dist_int8.int8 import kv, ops
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.decoder_blocks import (
    BlockSettings,
    BlockTensors,
    LinearRule,
    decoder_blocks,
    runs,
)
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.block import Cache, DecoderBlock, Norm, PositionTables

# What `decoder_blocks` reads of a block, in its order.
NORMS = ("attention_norm", "mlp_norm")
LINEARS = ("qkv", "attention_output", "gate_up", "down")
PARTS = ("weight_int8", "col_scale", "bias", "hot_columns", "hot_weight")

Hidden = tuple[Tensor, Tensor | None]  # (x, residual); their sum is the hidden state


def run_blocks(
    blocks: Iterable[DecoderBlock],
    x: Tensor,
    segments: Tensor,
    caches_of: Callable[[int], tuple[Cache, Cache]],
    tables: PositionTables,
) -> Hidden:
    """Runs x [T, hidden] through blocks, whose caches are `caches_of(0)`, ... -> (x, residual)."""
    residual: Tensor | None = None
    numbered = [(block, *caches_of(index)) for index, block in enumerate(blocks)]
    if numbered and isinstance(numbered[0][1], Tensor):  # once for all blocks
        segments = ops.decode_segments(segments, numbered[0][1], tables.cos)
    # torch.compile and hooks on all modules want to see the ops and the modules.
    if not runs(x) or torch.compiler.is_compiling() or _has_any_global_hook():
        return _one_by_one(numbered, x, residual, segments, tables)
    for rule, some in groupby(numbered, lambda item: _rule_in_one_call(item[0])):
        group = list(some)
        if rule is None:
            x, residual = _one_by_one(group, x, residual, segments, tables)
        else:
            x, residual = _in_one_call(group, rule, x, residual, segments, tables)
    return x, residual


def _one_by_one(
    numbered: Iterable[tuple[DecoderBlock, Cache, Cache]],
    x: Tensor,
    residual: Tensor | None,
    segments: Tensor,
    tables: PositionTables,
) -> Hidden:
    for block, key_cache, value_cache in numbered:
        x, residual = block(x, residual, segments, key_cache, value_cache, tables)
    return x, residual


def _rule_in_one_call(block: DecoderBlock) -> tuple[Any, ...] | None:
    """What blocks of one call have in common; None where a block has to run op by op.

    It has to where its arrangement is not that of `decoder_blocks`, where a part is not one of our
    own classes, where its two norms or four linears differ in their rule, and where a module has
    hooks, which expect it to be called.
    """
    spec = block.spec
    if not spec.gated or spec.norm_after or spec.residual_from_norm or spec.parallel_residual:
        return None
    # Not block.qkv and so on: nn.Module.__getattr__ costs about 1 us for each.
    modules: dict[str, Any] = block._modules
    if type(block) is not DecoderBlock or _is_watched(block):
        return None
    for names, kind in ((NORMS, Norm), (LINEARS, Int8Linear)):
        if any(type(modules[name]) is not kind or _is_watched(modules[name]) for name in names):
            return None
    norm, linear = modules[NORMS[0]], modules[LINEARS[0]]
    norm_rule = norm.kind, norm.eps
    linear_rule = _rule_of(linear)
    for name in NORMS:
        if (modules[name].kind, modules[name].eps) != norm_rule:
            return None
    for name in LINEARS:
        if _rule_of(modules[name]) != linear_rule:
            return None
    return spec, block.scale, *norm_rule, linear_rule


def _rule_of(linear: Int8Linear) -> LinearRule:
    return LinearRule(linear.outlier_rule, linear.outlier_threshold, linear.rotation)


def _is_watched(module: nn.Module) -> bool:
    # accelerate's hooks put another `forward` on the module itself
    replaced = "forward" in module.__dict__
    return bool(replaced or module._forward_hooks or module._forward_pre_hooks)


def _in_one_call(
    group: list[tuple[DecoderBlock, Cache, Cache]],
    rule: tuple[Any, ...],
    x: Tensor,
    residual: Tensor | None,
    segments: Tensor,
    tables: PositionTables,
) -> Hidden:
    spec, scale, norm_kind, norm_eps, linear_rule = rule
    attention = AttentionArgs(spec.num_heads, spec.num_kv_heads, scale, *tables, window=spec.window)
    tensors = [_collect_tensors(*item) for item in group]
    settings = BlockSettings(norm_eps, norm_kind, linear_rule, attention)
    return decoder_blocks(x, residual, segments, tensors, settings)


def _collect_tensors(block: DecoderBlock, key_cache: Cache, value_cache: Cache) -> BlockTensors:
    modules: dict[str, Any] = block._modules
    parameters = [modules[name]._parameters for name in NORMS]
    buffers = [modules[name]._buffers for name in LINEARS]
    if isinstance(key_cache, kv.Int8KV) and isinstance(value_cache, kv.Int8KV):
        caches: tuple[Tensor, ...] = (*key_cache, *value_cache)
    else:
        assert isinstance(key_cache, Tensor) and isinstance(value_cache, Tensor)
        caches = (key_cache, value_cache)
    return BlockTensors(
        [norm[part] for norm in parameters for part in ("weight", "bias")],
        [linear[part] for linear in buffers for part in PARTS],
        caches,
    )
