"""Attention over keys and values that are kept in int8, with a scale a token and head.

Keys are rounded as they are attended to, behind the rotary embedding, and a token attends to its
own rounded key too: what it sees does not depend on how a prompt was cut. There is no kernel for it
yet: the keys and values of one sequence after the other are widened for the attention of `ops`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_int8.int8 import ops, plain, reference


class Int8KV(NamedTuple):
    """The keys or the values of S slots of L tokens, of one block."""

    values: Tensor  # int8 [S, KV, L, D]
    scale: Tensor  # fp32 [S, KV, L]


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [T, KV, D] -> int8 [T, KV, D], scale fp32 [T, KV]; rounded as weights are."""
    flat, scale = reference.quantize_weight(x.flatten(0, 1))
    return flat.view(x.shape), scale.view(x.shape[:2])


def attention(
    qkv: Tensor,
    key_cache: Int8KV,
    value_cache: Int8KV,
    segments: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """`ops.attention` with caches in int8; the same arguments and errors.

    segments are on the CPU. Memory beside the result: the widened keys and values of one slot.
    """
    head_dim = key_cache.values.shape[3]
    num_tokens = qkv.shape[0]
    rows = segments.tolist()
    covered = sum(count for _, _, count in rows)
    if covered != num_tokens:
        raise ValueError(
            f"attention: segments must cover T={num_tokens} tokens of qkv, got {covered}; "
            "their counts must add up to the rows of qkv"
        )
    plain.check_segments(rows, key_cache.values.transpose(2, 3), cos)
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim).float()
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if cos is not None and sin is not None:
        positions = [p for _, start, count in rows for p in range(start, start + count)]
        at = torch.tensor(positions, device=qkv.device)
        query, key = (plain.rotate(x, cos[at], sin[at]) for x in (query, key))
    for cache, new in ((key_cache, key), (value_cache, value)):
        values, scales = quantize_heads(new)
        first = 0
        for slot, start, count in rows:
            tokens = slice(first, first + count)
            cache.values[slot, :, start : start + count] = values[tokens].transpose(0, 1)
            cache.scale[slot, :, start : start + count] = scales[tokens].transpose(0, 1)
            first += count

    out = torch.empty((num_tokens, num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    attend = ops.attention if qkv.is_cpu else plain.attention
    first = 0
    for slot, start, count in rows:
        tokens, end = slice(first, first + count), start + count
        keys, values = (_widened(cache, slot, end, qkv.dtype) for cache in (key_cache, value_cache))
        new_keys, new_values = keys[:, start:].transpose(0, 1), values[:, start:].transpose(0, 1)
        widened = torch.cat([query[tokens].to(qkv.dtype), new_keys, new_values], dim=1)
        out[tokens] = attend(
            widened.flatten(1),
            keys.transpose(1, 2).contiguous()[None],
            values[None],
            torch.tensor([[0, start, count]], dtype=torch.int32),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            scale=scale,
            cos=None,
            sin=None,
            alibi_slopes=alibi_slopes,
            window=window,
        )
        first += count
    return out


def _widened(cache: Int8KV, slot: int, end: int, dtype: torch.dtype) -> Tensor:
    """The first `end` tokens of a slot -> [KV, end, D] in `dtype`."""
    return (cache.values[slot, :, :end].float() * cache.scale[slot, :, :end, None]).to(dtype)
