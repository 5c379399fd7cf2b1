"""Attention over the KV cache: compiled where the library has a kernel, else plain torch."""

import torch
from torch import Tensor

from dist_int8.int8 import plain
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.library import load
from dist_int8.int8.registry import has_kernel

_attention = torch.ops.dist_int8.attention.default if load() else None
_ATTENDS_ON_CUDA = has_kernel("attention", "CUDA")
_KEY_GROUP = 16  # kKeyGroup in csrc
_CUDA_HEAD_DIM = 256  # the largest D of the CUDA kernel


def attention(
    qkv: Tensor, key_cache: Tensor, value_cache: Tensor, segments: Tensor, args: AttentionArgs
) -> Tensor:
    """Causal attention of T new tokens; their keys and values first go to the caches, in place.

    Softmax in fp32 of scale * q . k.

    Args:
        qkv: [T, (H + 2 * KV) * D]: all query heads, all key heads, all value heads.
        key_cache: [S, KV, D, L] in qkv's dtype: S slots of L tokens; keys lie transposed. The
            compiled op on CPUs also takes [S, KV, L/16, D, 16], see `key_cache_shape`.
        value_cache: [S, KV, L, D] in qkv's dtype.
        segments: int32 [B, 3] on the CPU, rows (slot, start, count): the next `count` rows of qkv
            are the tokens at positions start.. of that slot. Where every count is 1,
            `decode_segments` takes them to a GPU once for many calls.
        args: heads, scale and positions.

    Returns:
        [T, H * D] in qkv's dtype.

    Raises:
        ValueError: shapes and dtypes, a slot or a position outside the caches or the tables, and
            segments that do not add up to T, all before anything is written. Segments on a GPU are
            not read by the host: one that is not valid there gives NaN and leaves the caches alone.
    """
    if qkv.is_cuda:
        segments = decode_segments(segments, key_cache, args.cos)
    if _attention is not None and (
        (qkv.is_cpu and qkv.dtype == torch.float32) or (qkv.is_cuda and segments.is_cuda)
    ):
        return _attention(qkv.contiguous(), key_cache, value_cache, segments, *args)
    return plain.attention(qkv, key_cache, value_cache, segments, args)


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


def decode_segments(segments: Tensor, key_cache: Tensor, cos: Tensor | None = None) -> Tensor:
    """The segments of `attention`, on the caches' GPU if its kernel takes them, else as they are.

    The kernel takes int32 [B, 3] with every count 1: one new token per sequence. The copy does not
    wait. Raises ValueError for a slot or a position outside the caches or the tables.
    """
    if (
        segments.is_cuda
        or not key_cache.is_cuda
        or not _ATTENDS_ON_CUDA
        or key_cache.shape[2] > _CUDA_HEAD_DIM
        or not bool((segments[:, 2] == 1).all())
    ):
        return segments
    plain.check_segments(segments.tolist(), key_cache, cos)
    return segments.pin_memory().to(key_cache.device, non_blocking=True)
