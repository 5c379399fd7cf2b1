"""The keys and values of every slot of one stage, allocated once."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from dist_int8.models import Cache, Int8KV, decodes_on_gpu, key_cache_shape

SLOT_UNIT = 16  # tokens


class KVCache:
    """Static KV slots of the blocks of one stage.

    Keys are stored transposed, so that the scores of neighbouring positions lie side by side, in
    the shape of `key_cache_shape`; values are [num_slots, num_kv_heads, max_tokens, head_dim]. In
    int8 the layout is the same, with an fp32 scale per token and head. Memory starts as zeros: a
    masked position contributes 0 * 0, never 0 * NaN. A slot has room for max_tokens, rounded up to
    a multiple of `SLOT_UNIT`, in which kernels read.
    """

    def __init__(
        self,
        num_blocks: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        int8: bool = False,
    ) -> None:
        max_tokens = -(-max_tokens // SLOT_UNIT) * SLOT_UNIT
        key_shape = key_cache_shape(num_slots, num_kv_heads, head_dim, max_tokens, dtype, device)
        value_shape = (num_slots, num_kv_heads, max_tokens, head_dim)
        scale_shape = (num_slots, num_kv_heads, max_tokens)
        self._layers: list[tuple[Cache, Cache]] = [
            (
                _int8_zeros(key_shape, scale_shape, device),
                _int8_zeros(value_shape, scale_shape, device),
            )
            if int8
            else (_zeros(key_shape, dtype, device), _zeros(value_shape, dtype, device))
            for _ in range(num_blocks)
        ]

    def layer(self, block: int) -> tuple[Cache, Cache]:
        """(key_cache, value_cache) of a block, counted within the stage."""
        return self._layers[block]

    @property
    def has_gpu_kernel(self) -> bool:
        """Whether decoding reads this cache by a kernel that needs nothing of the host."""
        return decodes_on_gpu(self._layers[0][0])

    def num_bytes(self) -> int:
        """Bytes reserved; on CPUs the operating system hands them out when first written."""
        caches = [cache for layer in self._layers for cache in layer]
        return sum(
            tensor.nbytes
            for cache in caches
            for tensor in ((cache,) if isinstance(cache, Tensor) else cache)
        )


def _int8_zeros(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], device: torch.device
) -> Int8KV:
    return Int8KV(_zeros(shape, torch.int8, device), _zeros(scale_shape, torch.float32, device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Pages of its own, which the kernel hands out zeroed when they are first written. torch.zeros
    # would write all of them at once. Nor may they be huge, as numpy asks for: where a head
    # has room for a long context, a short sequence would take 2 MiB of it.
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
