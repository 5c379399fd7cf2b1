"""Attention over the KV cache: compiled where the library has a kernel, else plain torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_int8.int8 import checks, plain, prefill, rows
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.kv import Cache, Int8KV, elements_of, list_tensors, list_with_scales
from dist_int8.int8.library import load
from dist_int8.int8.reference import QuantizedRows
from dist_int8.int8.registry import has_kernel, has_op
from dist_int8.int8.rotation import check_rotation
from dist_int8.int8.segments import Segments

_COMPILED = load()
_ops = torch.ops.dist_int8
_attention = _ops.attention.default if _COMPILED else None
_int8_attention = _ops.int8_kv_attention.default if has_op("int8_kv_attention") else None
_attention_quantize = _ops.attention_quantize.default if has_op("attention_quantize") else None
_ATTENDS_ON_CUDA = has_kernel("attention_quantize", "CUDA")  # the newest of them: all, or none
_KEY_GROUP = 16  # kKeyGroup in csrc
# The CUDA kernels take D and L that are multiples of 16, D up to 256.
_CUDA_UNIT, _CUDA_HEAD_DIM = 16, 256


def attention(
    qkv: Tensor,
    key_cache: Cache,
    value_cache: Cache,
    segments: Segments | Tensor,
    args: AttentionArgs,
) -> Tensor:
    """Causal attention of T new tokens; their keys and values first go to the caches, in place.

    Softmax in fp32 of scale * q . k. New keys and values of caches in int8 are rounded by
    `plain.quantize_heads`, bit for bit.

    Args:
        qkv: [T, (H + 2 * KV) * D]: all query heads, all key heads, all value heads. Of a prompt on
            a GPU it is changed.
        key_cache: [S, KV, D, L] in qkv's dtype, or `Int8KV`: S slots of L tokens; keys lie
            transposed. The compiled ops on CPUs also take [S, KV, L/16, D, 16], see
            `key_cache_shape`.
        value_cache: [S, KV, L, D] in qkv's dtype, or `Int8KV`.
        segments: which tokens the rows of qkv are; made once for many calls, or their rows, int32
            [B, 3] on the CPU: (slot, start, count). On a GPU a slot is in one of them only.
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
        segments = _on_gpu(qkv, key_cache, segments, args)
        return _attend_on_gpu(qkv, key_cache, value_cache, segments, args)
    on_host = segments if isinstance(segments, Tensor) else segments.rows
    op = _int8_attention if isinstance(key_cache, Int8KV) else _attention
    if op is not None and qkv.is_cpu and qkv.dtype == torch.float32:
        tensors = list_tensors(key_cache, value_cache)
        return op(qkv.contiguous(), *tensors, on_host, *args)
    return plain.attend(qkv, key_cache, value_cache, on_host, args)


def attention_quantize(
    qkv: Tensor,
    key_cache: Cache,
    value_cache: Cache,
    segments: Segments | Tensor,
    args: AttentionArgs,
    outlier_rule: str,
    outlier_threshold: float,
    hot_columns: Tensor | None = None,
    rotation: int = 0,
) -> QuantizedRows:
    """`attention` and `quantize_rows` of its result; in one op where all tokens decode on a GPU.

    The result is that of the two, bit for bit. Arguments and errors as there.
    """
    quantization = (outlier_rule, outlier_threshold, hot_columns, rotation)
    checks.check_outlier_rule(outlier_rule, outlier_threshold)
    check_rotation(rotation)
    if qkv.is_cuda:
        segments = _on_gpu(qkv, key_cache, segments, args)
        if segments.prompts is None and decodes_on_gpu(key_cache):
            return _attend_quantized_on_gpu(
                qkv, key_cache, value_cache, segments, args, quantization
            )
    context = attention(qkv, key_cache, value_cache, segments, args)
    return rows.quantize_rows(context, *quantization)


def _on_gpu(
    qkv: Tensor, key_cache: Cache, segments: Segments | Tensor, args: AttentionArgs
) -> Segments:
    if isinstance(segments, Segments):
        return segments
    check_segments(segments, key_cache, args.cos)
    return Segments.of(segments, qkv.device)


def _attend_on_gpu(
    qkv: Tensor, key_cache: Cache, value_cache: Cache, segments: Segments, args: AttentionArgs
) -> Tensor:
    """Tokens of sequences that decode go to our kernels, prompts to flash attention."""
    if not decodes_on_gpu(key_cache):
        return plain.attend(qkv, key_cache, value_cache, segments.rows, args)
    return split_attention(
        qkv, key_cache, value_cache, segments, args, decode=_decode, prefill=prefill.attention
    )


def _decode(
    qkv: Tensor, key_cache: Cache, value_cache: Cache, places: Tensor, args: AttentionArgs
) -> Tensor:
    op: Any = _int8_attention if isinstance(key_cache, Int8KV) else _attention
    attended: Tensor = op(qkv, *list_tensors(key_cache, value_cache), places, *args)
    return attended


def _attend_quantized_on_gpu(
    qkv: Tensor,
    key_cache: Cache,
    value_cache: Cache,
    segments: Segments,
    args: AttentionArgs,
    quantization: tuple[str, float, Tensor | None, int],
) -> QuantizedRows:
    assert _attention_quantize is not None
    outlier_rule, outlier_threshold, hot_columns, rotation = quantization
    return QuantizedRows(
        *_attention_quantize(
            qkv.contiguous(),
            *list_with_scales(key_cache, value_cache),
            segments.places,
            *args,
            rows.rule_index(outlier_rule, outlier_threshold),
            outlier_threshold,
            hot_columns,
            rotation,
        )
    )


def split_attention(
    qkv: Tensor,
    key_cache: Cache,
    value_cache: Cache,
    segments: Segments,
    args: AttentionArgs,
    *,
    decode: Callable[..., Tensor],
    prefill: Callable[..., Tensor],
) -> Tensor:
    """Attention of the first segments by `decode` and of the prompts behind them by `prefill`.

    Args:
        decode: of (qkv, key_cache, value_cache, places, args), one token per sequence.
        prefill: as `prefill.attention`.
    """
    qkv, first = qkv.contiguous(), segments.num_decodes
    if segments.prompts is None:
        return decode(qkv, key_cache, value_cache, segments.places, args)
    if not first:
        return prefill(qkv, key_cache, value_cache, segments, args)
    decoding, prompts = qkv.split([first, len(qkv) - first])
    places = segments.places.narrow(0, 0, first)
    parts = [
        decode(decoding, key_cache, value_cache, places, args),
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


def decodes_on_gpu(key_cache: Cache) -> bool:
    """Whether the library has a kernel that decodes over these keys [S, KV, D, L] on their GPU."""
    keys = elements_of(key_cache)
    if not (keys.is_cuda and _ATTENDS_ON_CUDA):
        return False
    head_dim, max_tokens = keys.shape[2:]
    is_vector = head_dim % _CUDA_UNIT == 0 and max_tokens % _CUDA_UNIT == 0
    return is_vector and head_dim <= _CUDA_HEAD_DIM


def check_segments(on_host: Tensor, key_cache: Cache, cos: Tensor | None = None) -> None:
    """Raises ValueError for rows int32 [B, 3] that kernels on a GPU could not take.

    Those outside the caches or the tables, and a slot that is in more than one: kernels place new
    keys while others read.
    """
    listed = on_host.tolist()
    plain.check_segments(listed, elements_of(key_cache), cos)
    slots = [slot for slot, _, _ in listed]
    if len(set(slots)) != len(slots):
        twice = next(slot for slot in slots if slots.count(slot) > 1)
        raise ValueError(
            f"attention: segments must be of different slots on a GPU, got slot {twice} more than "
            "once; give the tokens of a sequence as one segment"
        )


if _attention_quantize is not None:

    @torch.library.impl("dist_int8::attention_quantize", "CPU")
    def _attention_quantize_on_cpu(
        qkv: Tensor,
        key_cache: Tensor,
        key_scale: Tensor | None,
        value_cache: Tensor,
        value_scale: Tensor | None,
        segments: Tensor,
        *rest: Any,
    ) -> list[Tensor]:
        args, quantization = AttentionArgs(*rest[:7]), rest[7:]
        caches: tuple[Cache, Cache] = (key_cache, value_cache)
        if key_scale is not None and value_scale is not None:
            caches = Int8KV(key_cache, key_scale), Int8KV(value_cache, value_scale)
        context = attention(qkv, *caches, segments, args)
        quantized: list[Tensor] = _ops.quantize_rows(context, *quantization)
        return quantized
