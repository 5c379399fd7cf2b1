"""Writing safetensors files slice by slice, and cutting a list of tensors into files.

safetensors' own writer wants every tensor of a file in memory at once. The format is simple: eight
bytes with the length of a JSON header, the header, and the tensors without gaps
(https://huggingface.co/docs/safetensors).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_int8.checkpoint.tensor_files import TORCH_DTYPES, as_bytes

_ALIGNMENT = 8


@dataclass(frozen=True)
class Output:
    """A tensor to write."""

    name: str
    dtype: str
    """safetensors' name."""
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return TORCH_DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.itemsize


@dataclass(frozen=True)
class Group:
    """Tensors that are made together and stand in one file."""

    outputs: tuple[Output, ...]
    make: Callable[[], Iterator[tuple[int, int, Tensor]]]
    """Yields (which of `outputs`, first row, rows), in any order, each row once."""

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)


def cut(groups: Sequence[Group], shard_bytes: int) -> list[list[Group]]:
    """Groups in order, files of at most `shard_bytes` where the groups themselves allow it."""
    shards: list[list[Group]] = []
    size = 0
    for group in groups:
        if not shards or size + group.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.num_bytes
    return shards


def shard_name(index: int, count: int) -> str:
    """transformers' name of file `index` (from 0) of `count`."""
    return f"model-{index + 1:05}-of-{count:05}.safetensors"


def write_shard(path: Path, groups: Sequence[Group]) -> str:
    """Writes one file through to the disk and returns its sha256.

    The sum is of what is read back, after the last byte was written. The same groups give the same
    bytes. Memory: what `make` holds.
    """
    # Wide elements first, so that all are aligned whatever the shapes.
    outputs = [output for group in groups for output in group.outputs]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
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
    with path.open("wb+", buffering=0) as file:
        _write(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text), 0)
        for group in groups:
            missing = group.num_bytes
            for index, first, rows in group.make():
                output = group.outputs[index]
                assert rows.dtype == TORCH_DTYPES[output.dtype], (output, rows.dtype)
                row_bytes = torch.Size(output.shape[1:]).numel() * output.itemsize
                position = 8 + len(text) + offsets[output.name] + first * row_bytes
                _write(file.fileno(), as_bytes(rows.contiguous()), position)
                missing -= rows.nbytes
            assert missing == 0, (group.outputs, missing)
        os.fsync(file.fileno())
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count
