"""Where a checkpoint stores every parameter of a stage and in which form, or all that is wrong."""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dist_int8.checkpoint.piece import Piece
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.checkpoint.stored_int8 import FLOATING, StoredInt8
from dist_int8.models.config import ignored_tensors, tensor_sources
from dist_int8.models.sources import TensorSource
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice

_SHOWN = 100  # problems named in full in one error
_NEVER_INT8 = ("positions",)


@dataclass(frozen=True)
class Located:
    """A parameter of ours: its source, and the pieces it was resolved to.

    Attributes:
        hot_columns: int32 [H], the same for all pieces.
    """

    source: TensorSource
    pieces: tuple[Piece, ...]
    hot_columns: Tensor | None = field(default=None, compare=False)

    @property
    def is_int8(self) -> bool:
        """Whether it is stored in int8."""
        return any(piece.scale is not None for piece in self.pieces)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of every tensor it is made from."""
        return tuple(name for piece in self.pieces for name in piece.names)

    @cached_property
    def order(self) -> Tensor | None:
        """int64 [N]: the row of the parameter for each stored row; None: as stored."""
        if self.source.row_order == "as_stored":
            return None
        counts = [piece.shape[0] for piece in self.pieces]
        rows = torch.arange(sum(counts))
        stored = self.source.assemble(list(rows.split(counts)))
        order = torch.empty_like(rows)
        order[stored] = rows
        return order


def may_be_int8(target: str, source: TensorSource) -> bool:
    """Whether the parameter is the weight of a linear, or the token embedding."""
    return len(source.shapes[0]) == 2 and target.rpartition(".")[0] not in _NEVER_INT8


def is_int8_checkpoint(reader: CheckpointReader) -> bool:
    """Whether any matrix is stored in int8."""
    return any(reader.dtype(name) == "I8" for name in reader.names)


def is_int8(folder: str | Path, allow_pickle: bool = False) -> bool:
    """Whether the checkpoint of a folder is int8; False if there is none."""
    try:
        reader = CheckpointReader(folder, allow_pickle=allow_pickle, complete=False)
    except ValueError:
        return False  # the next reader says why
    return is_int8_checkpoint(reader)


def locate(
    reader: CheckpointReader, spec: ModelSpec, stage_slice: StageSlice
) -> dict[str, Located]:
    """Locates every parameter of the stage, keyed as `models.tensor_sources` does.

    Raises:
        ValueError: one error with every damaged file, all that is missing, misshapen or of a wrong
            dtype in the stage, and all that is unknown in the whole checkpoint.
    """
    problems = [*reader.problems, *_find_unknown(reader, spec)]
    located = {
        target: _settle(reader, target, source, problems)
        for target, source in tensor_sources(spec, stage_slice).items()
    }
    problems += _find_lost_hot_columns(reader, located)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"{reader.folder}: checkpoint must fit its config.json, got {len(problems)} "
            f"problem(s): {'; '.join(problems[:_SHOWN])}{more}; check that config and weights "
            "belong together"
        )
    return located


def _find_lost_hot_columns(reader: CheckpointReader, located: dict[str, Located]) -> list[str]:
    """Finds linears without the hot columns of config.json; int8 weights leave those out."""
    path = reader.folder / "config.json"
    fields = json.loads(path.read_text()) if path.is_file() else {}
    written = fields.get("quantization_config")
    if not isinstance(written, dict) or written.get("quant_method") != "dist_int8":
        return []
    problems = []
    for target, entry in located.items():
        key = "head_hot_columns" if target == "lm_head.weight" else "num_hot_columns"
        if not entry.is_int8 or not target.startswith(("blocks.", "lm_head.")):
            continue
        piece = entry.pieces[0]
        count = written.get(key, 0)
        if not isinstance(count, int):
            return [f"config.json: {key} must be a number, got {count!r}"]
        wanted = min(count, piece.shape[1])
        found = 0 if entry.hot_columns is None else len(entry.hot_columns)
        if found < wanted:
            base = piece.name.removesuffix("weight")
            problems.append(
                f"{base}hot_columns and {base}hot_weight must have {wanted} columns, as "
                f"config.json says ({key}), got {found}"
            )
    return problems


def _find_unknown(reader: CheckpointReader, spec: ModelSpec) -> list[str]:
    whole = tensor_sources(spec, StageSlice.whole(spec))
    known = {name for source in whole.values() for names in source.names for name in names}
    for name in list(known):
        if name in reader and reader.dtype(name) == "I8":
            base = name.removesuffix("weight")
            known |= {base + kind for kind in ("col_scale", "hot_columns", "hot_weight")}
            known |= {base + kind for kind in ("SCB", "weight_format")}
    ignored = re.compile("|".join(ignored_tensors(spec)) or r"(?!)")
    return [
        f"unknown tensor {name}"
        for name in reader.names
        if name not in known and not ignored.search(name)
    ]


def _settle(
    reader: CheckpointReader, target: str, source: TensorSource, problems: list[str]
) -> Located:
    pieces: list[Piece] = []
    hot: list[Tensor | None] = []
    for candidates, shape in zip(source.names, source.shapes, strict=False):
        name = next((name for name in candidates if name in reader), None)
        if name is None:
            if not reader.unreadable.intersection(candidates):  # its file is already named
                problems.append(f"missing tensor {candidates[0]}")
            continue
        if may_be_int8(target, source) and reader.dtype(name) == "I8":
            piece, columns = StoredInt8(reader, name, shape, problems).settle()
            pieces.append(piece)
            hot.append(columns)
            continue
        if reader.shape(name) != shape:
            problems.append(f"{name} must have shape {list(shape)}, got {list(reader.shape(name))}")
        elif reader.dtype(name) not in FLOATING:
            problems.append(f"{name} must be floating-point, got {reader.dtype(name)}")
        pieces.append(Piece(name, shape))
        hot.append(None)
    if len({piece.scale is None for piece in pieces}) > 1:
        problems.append(
            f"{', '.join(piece.name for piece in pieces)} must be all int8 or all floating-point, "
            "because they make one matrix here"
        )
    columns = hot[0] if hot else None
    if any(_as_list(other) != _as_list(columns) for other in hot):
        problems.append(
            f"{', '.join(piece.name for piece in pieces)} must have the same hot columns, because "
            "they make one matrix here"
        )
    return Located(source, tuple(pieces), columns)


def _as_list(columns: Tensor | None) -> list[int] | None:
    return None if columns is None else columns.tolist()
