"""The layout of int8 weights that the CPU kernels read without shuffles, and back.

A strip of 16 output features is contiguous in both layouts, so packing takes place within a strip
and needs no memory beside it: weight_int8 [N, K] becomes [N/16, K/4, 16, 4] and hot weights [N, H]
become [N/16, H, 16]. It holds where N is a multiple of 16 and K of 4; other weights stay row-major,
which the kernels take too: they pack on the way, more slowly, with the same result.
"""

import torch
from torch import Tensor

from dist_int8.int8.registry import has_kernel

STRIP = 16  # output features
GROUP = 4  # input features
SLICE_BYTES = 1 << 22  # rearranged at once


def can_pack(weight_int8: Tensor) -> bool:
    """Whether a kernel here reads weight_int8 [N, K] packed: on CPUs, in whole strips."""
    if weight_int8.dim() != 2 or not weight_int8.is_cpu or not weight_int8.is_contiguous():
        return False
    n, k = weight_int8.shape
    is_whole = n * k > 0 and n % STRIP == 0 and k % GROUP == 0
    return is_whole and has_kernel("int8_linear", "CPU")


def is_packed(weight_int8: Tensor) -> bool:
    return weight_int8.dim() == 4


def count_outputs(weight_int8: Tensor) -> int:
    """N of a weight in either layout."""
    return weight_int8.shape[0] * (STRIP if is_packed(weight_int8) else 1)


@torch.no_grad()
def pack_(rows: Tensor, group: int) -> Tensor:
    """Rearranges rows [N, K] within their memory -> [N/16, K/group, 16, group], the same memory.

    What else looks at that memory sees it change. `group` divides K, 16 divides N; a group of 1 has
    no dimension of its own.
    """
    n, k = rows.shape
    strips = rows.view(n // STRIP, STRIP, k // group, group)
    packed = rows.view(n // STRIP, k // group, STRIP, group)
    step = max(1, SLICE_BYTES // (STRIP * k * rows.element_size()))
    for first in range(0, len(strips), step):
        piece = strips[first : first + step].clone()
        packed[first : first + step] = piece.transpose(1, 2)
    return packed if group > 1 else packed.squeeze(-1)


def unpack(packed: Tensor) -> Tensor:
    """[N/16, K/4, 16, 4] -> a new row-major [N, K]; hot weights [N/16, H, 16] -> [N, H]."""
    return packed.transpose(1, 2).reshape(len(packed) * STRIP, -1)


def row_major(weight: Tensor) -> Tensor:
    """A weight or hot weights as a matrix: themselves where they are one."""
    return weight if weight.dim() == 2 else unpack(weight)


def rows_of(weight_int8: Tensor, index: Tensor) -> Tensor:
    """Rows `index` int64 [T] of a weight in either layout -> int8 [T, K]."""
    if not is_packed(weight_int8):
        return weight_int8[index]
    return weight_int8[index // STRIP, :, index % STRIP].flatten(1)
