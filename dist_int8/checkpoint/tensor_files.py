"""One checkpoint file: what it holds, and reading any of its rows into memory of our own.

Nothing is mapped into memory. A mapped page counts as ours until the tensor is freed, and a file
that shrinks while mapped kills the process with SIGBUS; a short read is an error.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# safetensors' names of the dtypes that our models can be made of.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LARGEST_READ = 1 << 30  # Linux reads at most 2 GiB at a time


@dataclass(frozen=True)
class StoredTensor:
    """What a file says about a tensor.

    Attributes:
        dtype: safetensors' name: F32, BF16, F16, I8, ...
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * TORCH_DTYPES[self.dtype].itemsize


class TensorFile(Protocol):
    """A file of named tensors."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Its tensors, by name."""
        ...

    def read_into(self, name: str, first: int, out: Tensor) -> None:
        """Fills `out` (contiguous, on the CPU, of the stored dtype) with rows from `first` on."""
        ...


class SafetensorsFile:
    """A .safetensors file.

    Raises:
        ValueError: damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt", device="cpu"):
                pass  # checks the header, and that the file has the length it says
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(describe_damage(path, error)) from None
        header.pop("__metadata__", None)
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(tuple(entry["shape"]), entry["dtype"])
            for name, entry in header.items()
        }
        self._begin = {
            name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()
        }

    def read_into(self, name: str, first: int, out: Tensor) -> None:
        position = self._position(name, first)
        left = as_bytes(out)
        with self._path.open("rb", buffering=0) as file:
            while left:
                count = os.preadv(file.fileno(), [left[:_LARGEST_READ]], position)
                if not count:
                    raise ValueError(
                        f"{self._path}:{name}: file must not change while it is read, got its end "
                        f"at byte {position}; write the checkpoint aside and rename it"
                    )
                left, position = left[count:], position + count

    def _position(self, name: str, row: int) -> int:
        stored = self.tensors[name]
        row_bytes = torch.Size(stored.shape[1:]).numel() * TORCH_DTYPES[stored.dtype].itemsize
        return self._begin[name] + row * row_bytes


def as_bytes(tensor: Tensor) -> memoryview:
    """Views the memory of a contiguous tensor on the CPU as bytes."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def describe_damage(path: Path, error: Exception) -> str:
    """Describes in one line what is wrong with a file."""
    reason = " ".join((str(error) or type(error).__name__).split())
    return f"damaged or truncated file {path.name} ({path.stat().st_size} bytes): {reason}"
