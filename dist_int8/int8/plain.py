"""The ops in plain torch: what runs where the compiled library has no kernel, on any device.

Same arguments and results as in `dist_int8.int8.ops`, which documents them. `quantize_rows` and
`int8_linear` in plain torch are the specification itself, `dist_int8.int8.reference`.
"""

from typing import Any

import torch
from torch import Tensor

from dist_int8.int8 import reference
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.kv import Cache, Int8KV, elements_of, list_tensors


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda and x.dtype == weight.dtype:
        # cuBLAS sums in fp32 and needs no fp32 copy of the weight: 14 GB for BLOOM-176B's head
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    values = x.float()
    if kind == "layer":
        values = values - values.mean(dim=-1, keepdim=True)
    values = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    y = values * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] fp32, its first R of D dimensions turned by cos, sin [T, R/2]."""
    half = cos.shape[1]
    a, b, rest = x.split([half, half, x.shape[2] - 2 * half], dim=2)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.cat([a * c - b * s, b * c + a * s, rest], dim=2)


def _check_layout(key_cache: Tensor, op: str = "attention") -> None:
    if key_cache.dim() != 4:
        raise ValueError(
            f"{op}: key_cache must be [S, KV, D, L], got {list(key_cache.shape)}; "
            "keys in groups are for the compiled op on CPUs"
        )


def check_segments(
    rows: list[list[int]], key_cache: Tensor, cos: Tensor | None, op: str = "attention"
) -> None:
    """Raises ValueError for a (slot, start, count) outside the caches or the tables."""
    _check_layout(key_cache, op)
    num_slots, _, _, max_tokens = key_cache.shape
    limit = max_tokens if cos is None else min(max_tokens, cos.shape[0])
    for b, (slot, start, count) in enumerate(rows):
        if not 0 <= slot < num_slots:
            raise ValueError(
                f"{op}: segments[{b}] slot must be in 0..{num_slots - 1}, got {slot}; "
                "the cache has that many slots"
            )
        if start < 0 or count < 0 or start + count > limit:
            raise ValueError(
                f"{op}: segments[{b}] positions must be in 0..{limit - 1}, "
                f"got {start}..{start + count - 1}; raise max_tokens or shorten the sequence"
            )


def check_cover(rows: list[list[int]], num_tokens: int, op: str = "attention") -> None:
    """Raises ValueError where segments do not add up to the rows of qkv."""
    covered = sum(count for _, _, count in rows)
    if covered != num_tokens:
        raise ValueError(
            f"{op}: segments must cover T={num_tokens} tokens of qkv, got {covered}; "
            "their counts must add up to the rows of qkv"
        )


def attention(
    qkv: Tensor, key_cache: Tensor, value_cache: Tensor, segments: Tensor, args: AttentionArgs
) -> Tensor:
    """Documented in `dist_int8.int8.attention`. Scores of one segment after the other."""
    head_dim = key_cache.shape[2]
    num_tokens = qkv.shape[0]
    rows = segments.tolist()
    check_cover(rows, num_tokens)
    check_segments(rows, key_cache, args.cos)
    query, key, value = _split_heads(qkv, head_dim, rows, args)

    # Every write comes before the first read: a slot may appear in more than one segment.
    first = 0
    for slot, start, count in rows:
        tokens = slice(first, first + count)
        key_cache[slot, :, :, start : start + count] = key[tokens].permute(1, 2, 0).to(qkv.dtype)
        value_cache[slot, :, start : start + count] = value[tokens].transpose(0, 1).to(qkv.dtype)
        first += count

    out = torch.empty_like(query)
    first = 0
    for slot, start, count in rows:
        tokens, end = slice(first, first + count), start + count
        keys, values = key_cache[slot, :, :, :end], value_cache[slot, :, :end]
        out[tokens] = _attend(query[tokens], keys, values, start, args)
        first += count
    return out.to(qkv.dtype).reshape(num_tokens, args.num_heads * head_dim)


def attend(
    qkv: Tensor, key_cache: Cache, value_cache: Cache, segments: Tensor, args: AttentionArgs
) -> Tensor:
    """`attention` or `int8_kv_attention`, whichever the caches are of.

    Raises ValueError for tensors that do not go together.
    """
    tensors = list_tensors(key_cache, value_cache)
    _check(qkv, key_cache, value_cache, args)
    of_kind: Any = int8_kv_attention if isinstance(key_cache, Int8KV) else attention
    attended: Tensor = of_kind(qkv.contiguous(), *tensors, segments, args)
    return attended


def _check(qkv: Tensor, key_cache: Cache, value_cache: Cache, args: AttentionArgs) -> None:
    keys, values = elements_of(key_cache), elements_of(value_cache)
    _check_layout(keys)
    slots, kv_heads, head_dim, max_tokens = keys.shape
    expected = [slots, kv_heads, max_tokens, head_dim]
    if list(values.shape) != expected:
        raise ValueError(
            f"attention: value_cache must be {expected} beside these keys, got "
            f"{list(values.shape)}; make it for as many slots, heads and tokens"
        )
    dtype = torch.int8 if isinstance(key_cache, Int8KV) else qkv.dtype
    if keys.dtype != dtype or values.dtype != dtype:
        raise ValueError(
            f"attention: caches must be {dtype} for this qkv, got {keys.dtype} and "
            f"{values.dtype}; make them in the dtype of qkv"
        )
    width = (args.num_heads + 2 * args.num_kv_heads) * head_dim
    if kv_heads != args.num_kv_heads or qkv.dim() != 2 or qkv.shape[1] != width:
        raise ValueError(
            f"attention: qkv must be [T, (H+2*KV)*D={width}] with KV={kv_heads} heads in the "
            f"caches, got {list(qkv.shape)}; check num_heads and num_kv_heads"
        )


def place_tokens(
    qkv: Tensor, key_cache: Cache, value_cache: Cache, places: Tensor, args: AttentionArgs
) -> None:
    """Documented in `dist_int8.int8.prefill`. No host reads."""
    head_dim = elements_of(key_cache).shape[2]
    H, KV = args.num_heads, args.num_kv_heads
    heads = qkv.view(qkv.shape[0], H + 2 * KV, head_dim)
    slots, positions = places[:, 0].long(), places[:, 1].long()
    turned = heads.float()
    if args.cos is not None and args.sin is not None:
        tables = args.cos[positions], args.sin[positions]
        turned = torch.cat([rotate(turned[:, : H + KV], *tables), turned[:, H + KV :]], dim=1)
    query, key, value = turned.split([H, KV, KV], dim=1)
    if isinstance(key_cache, Int8KV) and isinstance(value_cache, Int8KV):
        key = _place_int8(key, key_cache, (slots, slice(None), slice(None), positions), places)
        value = _place_int8(value, value_cache, (slots, slice(None), positions), places)
        turned = torch.cat([query, key, value], dim=1)
    heads.copy_(turned)
    if not isinstance(key_cache, Int8KV) and not isinstance(value_cache, Int8KV):
        key_cache[slots, :, :, positions] = heads[:, H : H + KV]
        value_cache[slots, :, positions] = heads[:, H + KV :]


def _place_int8(heads: Tensor, cache: Int8KV, at: tuple[Any, ...], places: Tensor) -> Tensor:
    """Rounds heads fp32 [T, KV, D] into a cache, and returns them as it holds them."""
    rounded, scale = quantize_heads(heads)
    cache.values[at] = rounded
    cache.scale[places[:, 0].long(), :, places[:, 1].long()] = scale
    return rounded * scale[..., None]


def _split_heads(
    qkv: Tensor, head_dim: int, rows: list[list[int]], args: AttentionArgs
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv of the segments `rows` -> query [T, H, D], key and value [T, KV, D] in fp32, rotated."""
    H, KV = args.num_heads, args.num_kv_heads
    heads = qkv.view(qkv.shape[0], H + 2 * KV, head_dim).float()
    query, key, value = heads.split([H, KV, KV], dim=1)
    if args.cos is not None and args.sin is not None:
        positions = [p for _, start, count in rows for p in range(start, start + count)]
        at = torch.tensor(positions, dtype=torch.long, device=qkv.device)
        query, key = (rotate(x, args.cos[at], args.sin[at]) for x in (query, key))
    return query, key, value


def _attend(query: Tensor, keys: Tensor, values: Tensor, start: int, args: AttentionArgs) -> Tensor:
    """query fp32 [n, H, D] at positions start.., over keys [KV, D, start + n] and values.

    values [KV, start + n, D]. Returns fp32 [n, H, D].
    """
    count, num_heads, head_dim = query.shape
    end = start + count
    grouped = query.view(count, args.num_kv_heads, num_heads // args.num_kv_heads, head_dim)
    grouped = grouped.permute(1, 2, 0, 3)
    scores = (grouped * args.scale) @ keys[:, None].float()
    key_positions = torch.arange(end, device=query.device)
    if args.alibi_slopes is not None:
        scores = scores + args.alibi_slopes.view(args.num_kv_heads, -1, 1, 1) * key_positions
    ages = torch.arange(start, end, device=query.device)[:, None] - key_positions
    hidden = ages < 0
    if args.window:
        hidden = hidden | (ages >= args.window)
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    attended = weights @ values[:, None].float()
    return attended.permute(2, 0, 1, 3).reshape(count, num_heads, head_dim)


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [T, KV, D] -> int8 [T, KV, D], scale fp32 [T, KV]; rounded as weights are."""
    flat, scale = reference.quantize_weight(x.flatten(0, 1))
    return flat.view(x.shape), scale.view(x.shape[:2])


def _write_int8(
    key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor, Tensor, Tensor], rows: list[list[int]]
) -> None:
    """Rounds key and value fp32 [T, KV, D] of the segments `rows` into int8 caches."""
    key_cache, key_scale, value_cache, value_scale = caches
    new_keys, new_key_scale = quantize_heads(key)
    new_values, new_value_scale = quantize_heads(value)
    first = 0
    for slot, start, count in rows:
        tokens, places = slice(first, first + count), slice(start, start + count)
        key_cache[slot, :, :, places] = new_keys[tokens].permute(1, 2, 0)
        key_scale[slot, :, places] = new_key_scale[tokens].transpose(0, 1)
        value_cache[slot, :, places] = new_values[tokens].transpose(0, 1)
        value_scale[slot, :, places] = new_value_scale[tokens].transpose(0, 1)
        first += count


def int8_kv_attention(
    qkv: Tensor,
    key_cache: Tensor,
    key_scale: Tensor,
    value_cache: Tensor,
    value_scale: Tensor,
    segments: Tensor,
    args: AttentionArgs,
) -> Tensor:
    """`attention` over the rounded keys and values, those of the new tokens included.

    key_cache int8 [S, KV, D, L], value_cache int8 [S, KV, L, D], their scales fp32 [S, KV, L].
    Documented in `dist_int8.int8.attention`. Widens one slot after the other.
    """
    op = "int8_kv_attention"
    head_dim = key_cache.shape[2]
    num_tokens = qkv.shape[0]
    rows = segments.tolist()
    check_cover(rows, num_tokens, op)
    check_segments(rows, key_cache, args.cos, op)
    query, key, value = _split_heads(qkv, head_dim, rows, args)
    _write_int8(key, value, (key_cache, key_scale, value_cache, value_scale), rows)
    out = torch.empty((num_tokens, args.num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    rotated = args._replace(cos=None, sin=None)
    first = 0
    for slot, start, count in rows:
        tokens, end = slice(first, first + count), start + count
        keys = key_cache[slot, :, :, :end].float() * key_scale[slot, :, None, :end]
        values = value_cache[slot, :, :end].float() * value_scale[slot, :, :end, None]
        keys, values = keys.to(qkv.dtype), values.to(qkv.dtype)
        new = [keys[:, :, start:].permute(2, 0, 1), values[:, start:].transpose(0, 1)]
        out[tokens] = attention(
            torch.cat([query[tokens].to(qkv.dtype), *new], dim=1).flatten(1),
            keys[None],
            values[None],
            torch.tensor([[0, start, count]], dtype=torch.int32),
            rotated,
        )
        first += count
    return out
