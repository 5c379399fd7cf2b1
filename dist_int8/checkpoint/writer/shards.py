"""Writing safetensors files slice by slice, and cutting a list of tensors into files.

safetensors' own writer needs every tensor of a file in memory at once. The format is simple: eight
bytes with the length of a JSON header, the header, and the tensors without gaps
(https://huggingface.co/docs/safetensors).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dist_int8.checkpoint.tensor_files import TORCH_DTYPES, as_bytes

_ALIGNMENT = 8
_Sized = TypeVar("_Sized", bound="Sized")


@dataclass(frozen=True)
class Output:
    """A tensor to write.

    Attributes:
        dtype: safetensors' name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return TORCH_DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * self.itemsize


@dataclass(frozen=True)
class Group:
    """Tensors that are made together and stand in one file.

    Attributes:
        made: (which of `outputs`, first row, rows), in any order, each row once.
    """

    outputs: tuple[Output, ...]
    made: Iterable[tuple[int, int, Tensor]]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(output.num_bytes for output in self.outputs)


class Sized(Protocol):
    """Something that takes bytes in a file."""

    @property
    def num_bytes(self) -> int:
        """How many."""
        ...


def cut(groups: Sequence[_Sized], shard_bytes: int) -> list[list[_Sized]]:
    """Cuts groups, in order, into files of up to `shard_bytes` where the groups allow it."""
    shards: list[list[_Sized]] = []
    size = 0
    for group in groups:
        if not shards or size + group.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.num_bytes
    return shards


def name_shard(index: int, count: int) -> str:
    """Returns transformers' name of file `index` (from 0) of `count`."""
    return f"model-{index + 1:05}-of-{count:05}.safetensors"


def write_shard(path: Path, groups: Sequence[Group]) -> str:
    """Writes one file through to the disk and returns its sha256.

    The sum is of what is read back, after the last byte was written. The same groups give the same
    bytes. Memory: what making a group holds.
    """
    header, offsets = _make_header([output for group in groups for output in group.outputs])
    with path.open("wb+", buffering=0) as file:
        _write(file.fileno(), memoryview(header), 0)
        for group in groups:
            missing = group.num_bytes
            for index, first, rows in group.made:
                output = group.outputs[index]
                assert rows.dtype == TORCH_DTYPES[output.dtype], (output, rows.dtype)
                row_bytes = torch.Size(output.shape[1:]).numel() * output.itemsize
                position = len(header) + offsets[output.name] + first * row_bytes
                _write(file.fileno(), as_bytes(rows.contiguous()), position)
                missing -= rows.nbytes
            assert missing == 0, (group.outputs, missing)
        os.fsync(file.fileno())
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_header(outputs: Sequence[Output]) -> tuple[bytes, dict[str, int]]:
    """Makes the beginning of the file, and the offset of each tensor after it, by name."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    # Wide elements first, so that all are aligned whatever the shapes.
    for output in sorted(outputs, key=lambda output: -output.itemsize):
        offsets[output.name] = end
        end += output.num_bytes
        header[output.name] = {
            "dtype": output.dtype,
            "shape": output.shape,
            "data_offsets": [offsets[output.name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets


def _write(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count
