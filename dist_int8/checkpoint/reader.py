"""Reading checkpoints tensor by tensor, every problem found before the first read."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dist_int8.checkpoint.pickles import PickleFile
from dist_int8.checkpoint.tensor_files import (
    TORCH_DTYPES,
    SafetensorsFile,
    StoredTensor,
    TensorFile,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
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
        problems = self.problems
        names = [(SINGLE, INDEX)] + [(PICKLE_SINGLE, PICKLE_INDEX)] * allow_pickle
        for single, index in names:
            if (self.folder / index).is_file():
                self._open_index(index, problems)
            elif (self.folder / single).is_file():
                self._take(single, None, problems)
            else:
                continue
            break
        else:
            raise ValueError(_explain_no_checkpoint(self.folder))
        if problems and (complete or not self._tensors):
            raise ValueError(
                f"{self.folder}: checkpoint must be complete, got {len(problems)} problem(s): "
                f"{'; '.join(problems)}; download the checkpoint again"
            )

    def _open_index(self, index: str, problems: list[str]) -> None:
        path = self.folder / index
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path}: must be a JSON object with a weight_map, got something else; download it "
                "again"
            ) from None
        # An index of safetensors files may not name pickles.
        suffix = Path(index.removesuffix(".index.json")).suffix
        for file in files:
            listed = [name for name, named in weight_map.items() if named == file]
            if Path(file).name != file or Path(file).suffix != suffix:
                self.unreadable.update(listed)
                problems.append(f"{index} names {file!r}, which is not a file name of this folder")
            elif not (self.folder / file).is_file():
                self.unreadable.update(listed)
                problems.append(f"missing file {file} ({len(listed)} tensors)")
            else:
                self._take(file, listed, problems)

    def _take(self, file: str, listed: list[str] | None, problems: list[str]) -> None:
        """Adds the tensors of a file: those that the index lists there, or all."""
        path = self.folder / file
        try:
            opened: TensorFile = (
                SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)
            )
        except ValueError as error:
            self.unreadable.update(listed or ())
            problems.append(str(error))
            return
        names = list(opened.tensors) if listed is None else listed
        absent = [name for name in names if name not in opened.tensors]
        if absent:
            self.unreadable.update(absent)
            problems.append(f"{file} lacks tensors that the index lists: {', '.join(absent)}")
        for name in names:
            if name in opened.tensors:
                self._files[name] = opened
                self._tensors[name] = opened.tensors[name]

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


def _explain_no_checkpoint(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: must be a model folder, got no such folder; check the path"
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        return (
            f"{folder}: must hold {SINGLE}, got {pickles[0]} (a pickle, which can run code); "
            "convert it: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)"
            ".save_pretrained(new_folder), "
            "or, if you trust who made it, allow_pickle (--allow-pickle)"
        )
    return (
        f"{folder}: must hold {SINGLE} or {INDEX}, got neither; give the folder of a complete "
        "transformers checkpoint"
    )
