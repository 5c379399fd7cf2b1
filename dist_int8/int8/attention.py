"""Attention over the KV cache: compiled where the library has a kernel, else plain torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_int8.int8 import plain, prefill
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.library import load
from dist_int8.int8.registry import has_kernel
from dist_int8.int8.segments import Segments

_attention = torch.ops.dist_int8.attention.default if load() else None
_ATTENDS_ON_CUDA = has_kernel("attention", "CUDA")
_KEY_GROUP = 16  # kKeyGroup in csrc
_CUDA_HEAD_DIM = 256  # the largest D of the CUDA kernel


def attention(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    segments: Segments | Tensor,
    args: AttentionArgs,
) -> Tensor:
    """Causal attention of T new tokens; their keys and values first go to the caches, in place.

    Softmax in fp32 of scale * q . k.

    Args:
        qkv: [T, (H + 2 * KV) * D]: all query heads, all key heads, all value heads. Of a prompt on
            a GPU it is changed.
        key_cache: [S, KV, D, L] in qkv's dtype: S slots of L tokens; keys lie transposed. The
            compiled op on CPUs also takes [S, KV, L/16, D, 16], see `key_cache_shape`.
        value_cache: [S, KV, L, D] in qkv's dtype.
        segments: which tokens the rows of qkv are; made once for many calls, or their rows, int32
            [B, 3] on the CPU: (slot, start, count).
        args: heads, scale and positions.

    Returns:
        [T, H * D] in qkv's dtype.

    Raises:
        ValueError: shapes and dtypes, a slot or a position outside the caches or the tables, and
            segments that do not add up to T, all before anything is written. `Segments` on a GPU
            are not read by the host: `check_segments` looks once for many calls, and a token that
            is not valid there gives NaN and leaves the caches alone.
    """
    if qkv.is_cuda:
        if isinstance(segments, Tensor):
            check_segments(segments, key_cache, args.cos)
            segments = Segments.of(segments, qkv.device)
        return _attend_on_gpu(qkv, key_cache, value_cache, segments, args)
    rows = segments if isinstance(segments, Tensor) else segments.rows
    if _attention is not None and qkv.is_cpu and qkv.dtype == torch.float32:
        return _attention(qkv.contiguous(), key_cache, value_cache, rows, *args)
    return plain.attention(qkv, key_cache, value_cache, rows, args)


def _attend_on_gpu(
    qkv: Tensor, key_cache: Tensor, value_cache: Tensor, segments: Segments, args: AttentionArgs
) -> Tensor:
    """Tokens of sequences that decode go to our kernel, prompts to flash attention."""
    if _attention is None or not decodes_on_gpu(key_cache):
        return plain.attention(qkv, key_cache, value_cache, segments.rows, args)
    return split_attention(
        qkv, key_cache, value_cache, segments, args, decode=_attention, prefill=prefill.attention
    )


def split_attention(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    segments: Segments,
    args: AttentionArgs,
    *,
    decode: Callable[..., Tensor],
    prefill: Callable[..., Tensor],
) -> Tensor:
    """Attention of the first segments by `decode` and of the prompts behind them by `prefill`.

    Args:
        decode: of (qkv, key_cache, value_cache, places, *args), one token per sequence.
        prefill: as `prefill.attention`.
    """
    qkv, first = qkv.contiguous(), segments.num_decodes
    if segments.prompts is None:
        return decode(qkv, key_cache, value_cache, segments.places, *args)
    if not first:
        return prefill(qkv, key_cache, value_cache, segments, args)
    decoding, prompts = qkv.split([first, len(qkv) - first])
    places = segments.places.narrow(0, 0, first)
    parts = [
        decode(decoding, key_cache, value_cache, places, *args),
        prefill(prompts, key_cache, value_cache, segments, args),
    ]
    return torch.cat(parts)


def key_cache_shape(
    num_slots: int,
    num_kv_heads: int,
    head_dim: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[int, ...]:
    """The shape in which the op for qkv of that dtype and device reads keys at their best.

    [S, KV, D, L] everywhere; or, for compiled ops on CPUs where L is a multiple of 16, as many
    elements as [S, KV, L/16, D, 16]: a new key is then written to one page instead of D of them,
    and keys are read from one end to the other.
    """
    compiled = _attention is not None and device.type == "cpu" and dtype == torch.float32
    if compiled and max_tokens % _KEY_GROUP == 0:
        return num_slots, num_kv_heads, max_tokens // _KEY_GROUP, head_dim, _KEY_GROUP
    return num_slots, num_kv_heads, head_dim, max_tokens


def decodes_on_gpu(key_cache: Tensor) -> bool:
    """Whether the library has a kernel that decodes over keys [S, KV, D, L] on their GPU."""
    return key_cache.is_cuda and _ATTENDS_ON_CUDA and key_cache.shape[2] <= _CUDA_HEAD_DIM


def check_segments(rows: Tensor, key_cache: Tensor, cos: Tensor | None = None) -> None:
    """Raises ValueError for rows int32 [B, 3] outside the caches or the tables, on the host."""
    plain.check_segments(rows.tolist(), key_cache, cos)
