"""The ops in plain torch: what runs where the compiled library has no kernel, on any device.

Same arguments and results as in `dist_int8.int8.ops`, which documents them. `quantize_rows` and
`int8_linear` in plain torch are the specification itself, `dist_int8.int8.reference`.
"""

import torch
from torch import Tensor


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


def check_segments(rows: list[list[int]], key_cache: Tensor, cos: Tensor | None) -> None:
    """Raise ValueError for a (slot, start, count) outside the caches or the tables."""
    num_slots, _, _, max_tokens = key_cache.shape
    limit = max_tokens if cos is None else min(max_tokens, cos.shape[0])
    for b, (slot, start, count) in enumerate(rows):
        if not 0 <= slot < num_slots:
            raise ValueError(
                f"attention: segments[{b}] slot must be in 0..{num_slots - 1}, got {slot}; "
                "the cache has that many slots"
            )
        if start < 0 or count < 0 or start + count > limit:
            raise ValueError(
                f"attention: segments[{b}] positions must be in 0..{limit - 1}, "
                f"got {start}..{start + count - 1}; raise max_tokens or shorten the sequence"
            )


def attention(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    segments: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int,
) -> Tensor:
    head_dim = key_cache.shape[2]
    num_tokens = qkv.shape[0]
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    query, key, value = heads.float().split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    out = torch.empty_like(query)
    rows = segments.tolist()
    covered = sum(count for _, _, count in rows)
    if covered != num_tokens:
        raise ValueError(
            f"attention: segments must cover T={num_tokens} tokens of qkv, got {covered}; "
            "their counts must add up to the rows of qkv"
        )
    check_segments(rows, key_cache, cos)

    # Every write comes before the first read: a slot may appear in more than one segment.
    first = 0
    rotated = query
    if cos is not None and sin is not None:
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in rows]).to(
            qkv.device
        )
        rotated = rotate(query, cos[positions], sin[positions])
        key = rotate(key, cos[positions], sin[positions])
    for slot, start, count in rows:
        tokens = slice(first, first + count)
        key_cache[slot, :, :, start : start + count] = key[tokens].permute(1, 2, 0).to(qkv.dtype)
        value_cache[slot, :, start : start + count] = value[tokens].transpose(0, 1).to(qkv.dtype)
        first += count

    first = 0
    for slot, start, count in rows:
        tokens = slice(first, first + count)
        end = start + count
        grouped = rotated[tokens].view(count, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        scores = (grouped * scale) @ key_cache[slot, :, None, :, :end].float()
        key_positions = torch.arange(end, device=qkv.device)
        if alibi_slopes is not None:
            scores = scores + alibi_slopes.view(num_kv_heads, -1, 1, 1) * key_positions
        ages = torch.arange(start, end, device=qkv.device)[:, None] - key_positions
        hidden = ages < 0
        if window:
            hidden = hidden | (ages >= window)
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        attended = weights @ value_cache[slot, :, None, :end].float()
        out[tokens] = attended.permute(2, 0, 1, 3).reshape(count, num_heads, head_dim)
        first += count
    return out.to(qkv.dtype).reshape(num_tokens, num_heads * head_dim)
