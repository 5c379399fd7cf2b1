"""Attention over keys and values that are kept in int8, with one scale per token and head.

Keys are rounded after the rotary embedding, and a token attends to its own rounded key too, so what
it sees does not depend on how a prompt was split into chunks. On CPUs in fp32 it is one compiled
op, which reads int8; elsewhere plain torch widens one sequence after the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_int8.int8 import plain
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.library import load
from dist_int8.int8.registry import has_kernel
from dist_int8.int8.segments import Segments

_attention = (
    torch.ops.dist_int8.int8_kv_attention.default
    if load() and has_kernel("int8_kv_attention", "CPU")
    else None
)


class Int8KV(NamedTuple):
    """The keys or the values of S slots of L tokens, of one block."""

    values: Tensor  # int8, keys of `attention.key_cache_shape`, values [S, KV, L, D]
    scale: Tensor  # fp32 [S, KV, L]


def attention(
    qkv: Tensor,
    key_cache: Int8KV,
    value_cache: Int8KV,
    segments: Segments | Tensor,
    args: AttentionArgs,
) -> Tensor:
    """`ops.attention` with caches in int8; the same arguments and errors.

    New keys and values are rounded by `plain.quantize_heads`, bit for bit. For qkv in 16 bits or on
    a GPU, plain torch takes memory for the widened keys and values of one slot; the compiled op
    takes none.
    """
    rows = segments if isinstance(segments, Tensor) else segments.rows
    tensors = qkv.contiguous(), *key_cache, *value_cache, rows
    if _attention is not None and qkv.is_cpu and qkv.dtype == torch.float32:
        return _attention(*tensors, *args)
    return plain.int8_kv_attention(*tensors, args)
