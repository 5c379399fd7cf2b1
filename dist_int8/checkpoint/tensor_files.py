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

from dist_int8.models.json_file import is_lfs_pointer

# safetensors' names of the dtypes that are read.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The floating dtype that a weight stored in another one is worked on in. Eight bits with any split
# of exponent and mantissa fit into bfloat16.
FLOATING = {
    name: name if name in ("F32", "F16", "BF16") else "BF16" if name.startswith("F8") else "F32"
    for name in TORCH_DTYPES
}
_LARGEST_READ = 1 << 30  # Linux reads at most 2 GiB at a time


@dataclass(frozen=True)
class StoredTensor:
    """What a file says about a tensor.

    Attributes:
        dtype: safetensors' name: F32, BF16, F16, I8, ...
        num_bytes: of the whole tensor.
    """

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


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
            name: StoredTensor(tuple(entry["shape"]), entry["dtype"], end - begin)
            for name, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        }
        self._begin = {
            name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()
        }

    def read_into(self, name: str, first: int, out: Tensor) -> None:
        position = self._position(name, first)
        left = as_bytes(out)
        try:
            with self._path.open("rb", buffering=0) as file:
                while left:
                    count = os.preadv(file.fileno(), [left[:_LARGEST_READ]], position)
                    if not count:
                        raise ValueError(
                            f"{self._path}:{name}: file must not change while it is read, got its "
                            f"end at byte {position}; write the checkpoint aside and rename it"
                        )
                    left, position = left[count:], position + count
        except OSError as error:
            raise ValueError(
                f"{self._path}:{name}: must be readable, got {error.strerror or error}; check the "
                "disk, or copy the checkpoint again"
            ) from None

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
    if is_lfs_pointer(path):
        return f"{path.name} is a pointer of git-lfs: run `git lfs pull` in the folder"
    if isinstance(error, OSError):
        return f"{path.name} cannot be read: {error.strerror or error}"
    reason = " ".join((str(error) or type(error).__name__).split())
    return f"damaged or truncated file {path.name} ({path.stat().st_size} bytes): {reason}"
