"""Reading checkpoints tensor by tensor, every problem found before the first read."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dist_int8.checkpoint.pickles import PickleFile
from dist_int8.checkpoint.tensor_files import (
    FLOATING,
    TORCH_DTYPES,
    SafetensorsFile,
    StoredTensor,
    TensorFile,
)
from dist_int8.checkpoint.weight_files import choose_weight_file, read_weight_map

# Rows are read and processed in slices of about this many elements: the working set, with the fp32
# temporaries of quantizing, is then a few times 4 MiB, and stays in a CPU's cache.
SLICE = 1 << 20


class CheckpointReader:
    """The tensors of a model folder: `model.safetensors` or shards with an index.

    Opening reads every header (not the data). Nothing stays open or in memory between reads.

    Args:
        folder: of the checkpoint.
        allow_pickle: read `pytorch_model.bin`, or its shards, where there is no safetensors file.
        complete: False: do not raise for what `problems` lists.

    Attributes:
        problems: one sentence for every missing, damaged or contradictory file.
        unreadable: tensors that the index says to be in such files.

    Raises:
        ValueError: no checkpoint, a broken index, or one error with all problems.
    """

    def __init__(
        self, folder: str | Path, *, allow_pickle: bool = False, complete: bool = True
    ) -> None:
        self.folder = Path(folder)
        self.problems: list[str] = []
        self.unreadable: set[str] = set()
        self._files: dict[str, TensorFile] = {}
        self._tensors: dict[str, StoredTensor] = {}
        weight_file = choose_weight_file(self.folder, allow_pickle)
        if weight_file.is_index:
            self._open_index(weight_file.name)
        else:
            self._take(weight_file.name)
        if self.problems and (complete or not self._tensors):
            raise ValueError(
                f"{self.folder}: checkpoint must be complete, got {len(self.problems)} problem(s): "
                f"{'; '.join(self.problems)}; download the checkpoint again"
            )

    def _open_index(self, index: str) -> None:
        """Opens every file that an index names; all tensors of each count, as in transformers."""
        weight_map = read_weight_map(self.folder / index)
        # An index of safetensors files may not name pickles.
        suffix = Path(index.removesuffix(".index.json")).suffix
        absent: dict[str, list[str]] = {}
        for file in sorted(set(weight_map.values())):
            listed = [name for name, named in weight_map.items() if named == file]
            if Path(file).name != file or Path(file).suffix != suffix:
                problem = f"{index} names {file!r}, which is not a file name of this folder"
            elif not (self.folder / file).is_file():
                problem = f"missing file {file} ({len(listed)} tensors)"
            else:
                absent[file] = self._take(file, listed)
                continue
            self.unreadable.update(listed)
            self.problems.append(problem)
        for file, names in absent.items():
            if lost := [name for name in names if name not in self._tensors]:
                self.unreadable.update(lost)
                self.problems.append(
                    f"{file} lacks tensors that the index lists: {', '.join(lost)}"
                )

    def _take(self, file: str, listed: list[str] | None = None) -> list[str]:
        """Adds the tensors of a file; returns those that are listed there but absent."""
        path = self.folder / file
        try:
            opened: TensorFile = (
                SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)
            )
        except ValueError as error:
            self.unreadable.update(listed or ())
            self.problems.append(str(error))
            return []
        self._files.update(dict.fromkeys(opened.tensors, opened))
        self._tensors.update(opened.tensors)
        return [name for name in listed or () if name not in opened.tensors]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, from the header."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor as the header names it (F32, BF16, F16, I8, ...)."""
        return self._tensors[name].dtype

    def float_dtype(self, name: str) -> str:
        """Returns the floating dtype that a weight is worked on in, as stored where it can be.

        F64 and integers become F32, as in transformers; 8-bit floats BF16, which is exact.
        """
        return FLOATING.get(self.dtype(name), self.dtype(name))

    def common_dtype(self, names: Iterable[str]) -> torch.dtype:
        """Returns the floating dtype that holds every element of some weights."""
        dtypes = (TORCH_DTYPES[self.float_dtype(name)] for name in names)
        return functools.reduce(torch.promote_types, dtypes)

    def num_bytes(self, name: str) -> int:
        """Returns the stored size of a tensor in bytes, from the header."""
        return self._tensors[name].num_bytes

    def read(self, name: str) -> Tensor:
        """Reads a tensor in its stored dtype, on the CPU."""
        out = torch.empty(self.shape(name), dtype=TORCH_DTYPES[self.dtype(name)])
        self._files[name].read_into(name, 0, out)
        return out

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yields the tensor's rows in order, in slices of about SLICE elements: first row, rows.

        All slices share the same memory: copy what you keep.
        """
        shape, dtype, file = self.shape(name), self.dtype(name), self._files[name]
        num_rows = shape[0]
        step = max(1, SLICE // max(1, torch.Size(shape[1:]).numel()))
        buffer = torch.empty((min(step, num_rows), *shape[1:]), dtype=TORCH_DTYPES[dtype])
        for first in range(0, num_rows, step):
            end = min(num_rows, first + step)
            out = buffer[: end - first]
            file.read_into(name, first, out)
            yield first, out
