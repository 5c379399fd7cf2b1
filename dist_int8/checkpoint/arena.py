"""Memory that the weights of a CPU stage are cut from, one behind the other.

The kernels prefetch 32 KiB ahead. Where the next weight follows at once, the end of one fetches the
beginning of the next; where each has an allocation of its own, every linear begins with a wait, and
a decoding step of a small model takes 4 to 18% longer.
"""

import math

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 28  # taken at once; the operating system hands out pages when first written
LARGE = CHUNK_BYTES // 4  # tensors from here on have memory of their own: their ends do not matter
ALIGNMENT = 64


class Arena:
    """Gives out uninitialized tensors, neighbours in memory on CPUs.

    A chunk is freed when all its tensors are: what was cut from one arena should end together.

    Args:
        device: of the tensors; on others than the CPU each has memory of its own.
        separate: so it has on CPUs.
    """

    def __init__(self, device: torch.device | str, separate: bool = False) -> None:
        self.device = torch.device(device)
        self._cuts = self.device.type == "cpu" and not separate
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, aligned to 64 bytes."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not self._cuts or not 0 < num_bytes < LARGE:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self._used + num_bytes > self._chunk.numel():
            self._chunk = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
            self._used = -self._chunk.data_ptr() % ALIGNMENT
        piece = self._chunk[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return piece.view(dtype).view(shape)
