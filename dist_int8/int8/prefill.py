"""Attention of prompt chunks on a GPU: the flash attention that torch ships, on ragged batches.

No padding and no loop over sequences: `ops.place_tokens` rotates and writes all keys and values in
one launch, and one call of flash attention serves all chunks. A chunk that begins its sequence
reads keys and values where the linear left them; later ones are gathered from the cache. Of a cache
in int8 both are what it holds, rounded to the model's dtype.

The op is torch's own and not public. Its schema is compared with the one known here, and before it
is used for the first time, what it computes is compared with plain torch; where either differs,
attention is plain torch.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dist_int8.int8 import plain
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.kv import Cache, Int8KV, elements_of, list_with_scales
from dist_int8.int8.library import load
from dist_int8.int8.registry import has_kernel, has_op
from dist_int8.int8.segments import Prompts, Segments

_log = logging.getLogger(__name__)
_place_tokens = (
    torch.ops.dist_int8.place_tokens.default
    if load() and has_kernel("place_tokens", "CUDA")
    else None
)

# Arguments of torch.ops.aten._flash_attention_forward that are used here: torch 2.10 to 2.13 have
# them under these names, and each has others behind them.
ARGUMENTS = (
    *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p"),
    *("is_causal", "return_debug_mask", "scale", "window_size_left", "window_size_right"),
    "alibi_slopes",
)
_HEAD_DIM = 256  # the largest D of flash attention, a multiple of 8
_TOLERANCE = 2e-2  # of 16-bit results around 1


def attention(
    qkv: Tensor, key_cache: Cache, value_cache: Cache, segments: Segments, args: AttentionArgs
) -> Tensor:
    """`ops.attention` of the prompts among the segments, which qkv [T, ...] is of alone.

    qkv is changed: its queries and keys are rotated in place.
    """
    prompts = segments.prompts
    assert prompts is not None
    head_dim = elements_of(key_cache).shape[2]
    if not is_usable(qkv.device, qkv.dtype, head_dim, args.alibi_slopes is not None):
        return plain.attend(qkv, key_cache, value_cache, prompts.rows, args)
    places = segments.places.narrow(0, segments.num_decodes, len(qkv))
    place_tokens(qkv, key_cache, value_cache, places, args)
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    sizes = [args.num_heads, args.num_kv_heads, args.num_kv_heads]
    query, key, value = heads.split(sizes, dim=1)
    if prompts.sources:
        key, value = gather(key_cache, value_cache, prompts, qkv.dtype)
    out = attend(query, key, value, prompts, args)
    return out.reshape(qkv.shape[0], args.num_heads * head_dim)


def place_tokens(
    qkv: Tensor, key_cache: Cache, value_cache: Cache, places: Tensor, args: AttentionArgs
) -> None:
    """Rotates queries and keys of qkv in place and writes keys and values to the caches, in place.

    For caches in int8 the keys and values in qkv become what the caches hold.

    Args:
        qkv: [T, (H + 2 * KV) * D].
        key_cache, value_cache: [S, KV, D, L] and [S, KV, L, D] in qkv's dtype, or `Int8KV`.
        places: int32 [T, 3] on their device, (slot, position, 1) of each token. One outside the
            caches or the tables is passed over on a GPU.
        args: as of `ops.attention`.
    """
    if _place_tokens is not None and qkv.is_cuda:
        _place_tokens(qkv, *list_with_scales(key_cache, value_cache), places, *args)
    else:
        plain.place_tokens(qkv, key_cache, value_cache, places, args)


def gather(
    key_cache: Cache, value_cache: Cache, prompts: Prompts, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [all tokens of the prompts so far, KV, D], one sequence after the other."""
    keys, values = [], []
    for slot, end in prompts.sources:
        keys.append(_read(key_cache, slot, end, 2, dtype).permute(2, 0, 1))
        values.append(_read(value_cache, slot, end, 1, dtype).transpose(0, 1))
    return torch.cat(keys), torch.cat(values)


def _read(cache: Cache, slot: int, end: int, dim: int, dtype: torch.dtype) -> Tensor:
    """The first `end` tokens, which lie along `dim`, of a slot."""
    elements = elements_of(cache).select(0, slot).narrow(dim, 0, end)
    if not isinstance(cache, Int8KV):
        return elements
    scale = cache.scale.select(0, slot).narrow(1, 0, end).unsqueeze(3 - dim)
    return (elements * scale).to(dtype)


def attend(
    query: Tensor, key: Tensor, value: Tensor, prompts: Prompts, args: AttentionArgs
) -> Tensor:
    """Flash attention of query [T, H, D] over key and value [tokens so far, KV, D] -> [T, H, D].

    The last token of a segment sees all keys of its sequence, the one before it all but the last.
    """
    out, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        prompts.query_ends,
        prompts.key_ends,
        prompts.max_queries,
        prompts.max_keys,
        0.0,
        True,
        False,
        scale=args.scale,
        window_size_left=args.window - 1 if args.window else -1,
        window_size_right=0,
        alibi_slopes=args.alibi_slopes,
    )
    attended: Tensor = out
    return attended


def has_known_schema() -> bool:
    """Whether this torch's op takes what `attend` gives it."""
    if not hasattr(torch.ops.aten, "_flash_attention_forward"):
        return False
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    return names[:10] == list(ARGUMENTS[:10]) and set(ARGUMENTS) <= set(names)


@cache
def is_usable(device: torch.device, dtype: torch.dtype, head_dim: int, has_slopes: bool) -> bool:
    """Whether flash attention serves these tensors, and computes what plain torch does."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if head_dim % 8 or head_dim > _HEAD_DIM or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if not has_known_schema():
        _log.warning(
            "torch %s has another _flash_attention_forward than is known here: prompts run in "
            "plain torch, slowly",
            torch.__version__,
        )
        return False
    try:
        error = measure_error(device, dtype, head_dim, has_slopes)
    except RuntimeError as problem:
        _log.warning("flash attention fails: prompts run in plain torch, slowly: %s", problem)
        return False
    if not error <= _TOLERANCE:
        _log.warning(
            "flash attention differs from plain torch by %.3g: prompts run in plain torch, slowly",
            error,
        )
        return False
    return True


def measure_error(
    device: torch.device, dtype: torch.dtype, head_dim: int, has_slopes: bool
) -> float:
    """The largest difference between `attend` and plain torch, on a beginning and a later chunk."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.tensor([0.5, 0.25], device=device) if has_slopes else None
    rows = torch.tensor([[1, 0, 19], [0, 40, 5]], dtype=torch.int32)
    prompts = Segments.of(rows, device).prompts
    assert prompts is not None
    error = 0.0
    for window in (0, 17):
        args = AttentionArgs(2, 1, head_dim**-0.5, alibi_slopes=slopes, window=window)
        cache_shapes = ((2, 1, head_dim, 64), (2, 1, 64, head_dim))
        keys, values = (torch.randn(s, generator=generator).to(device, dtype) for s in cache_shapes)
        qkv = torch.randn(24, 4 * head_dim, generator=generator).to(device, dtype)
        expected = plain.attention(qkv, keys, values, rows, args)
        query = qkv.view(24, 4, head_dim)[:, :2]
        got = attend(query, *gather(keys, values, prompts, dtype), prompts, args)
        difference = (got.reshape(expected.shape) - expected).abs().max()
        error = max(error, float(difference))
    return error


if has_op("place_tokens"):

    @torch.library.impl("dist_int8::place_tokens", "CPU")
    def _place_tokens_on_cpu(
        qkv: Tensor,
        key_cache: Tensor,
        key_scale: Tensor | None,
        value_cache: Tensor,
        value_scale: Tensor | None,
        places: Tensor,
        *args: Any,
    ) -> None:
        caches: tuple[Cache, Cache] = (key_cache, value_cache)
        if key_scale is not None and value_scale is not None:
            caches = Int8KV(key_cache, key_scale), Int8KV(value_cache, value_scale)
        plain.place_tokens(qkv, *caches, places, AttentionArgs(*args))
