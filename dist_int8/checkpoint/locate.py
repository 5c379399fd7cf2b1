"""Where a checkpoint stores every parameter of a stage and in which form, or all that is wrong."""

import logging
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dist_int8.checkpoint.piece import Piece
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.checkpoint.stored_int8 import StoredInt8
from dist_int8.checkpoint.tensor_files import FLOATING
from dist_int8.models.config import ignored_tensors, tensor_sources
from dist_int8.models.json_file import read_json
from dist_int8.models.notice import warn_once
from dist_int8.models.sources import TensorSource
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice

_SHOWN = 100  # problems named in full in one error
_NAMED = 5  # tensors named in a warning
_NEVER_INT8 = ("positions",)
# Scales and the like of quantized weights, and adapters: a weight means nothing without them.
_OF_OTHER_FORMS = re.compile(
    r"(^|\.)(weight_scale(_inv)?|input_scale|scale_inv|weight_scale_2|weight_packed|weight_shape"
    r"|weight_zero_point|qweight|qzeros|scales|g_idx|absmax|quant_map|nested_absmax"
    r"|nested_quant_map|quant_state\..*|lora_.*|dora_.*|base_layer\..*)$"
)
_OF_OURS = re.compile(r"(^|\.)(col_scale|hot_columns|hot_weight|SCB|CB|weight_format)$")

logger = logging.getLogger(__name__)


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
        """Whether it is stored in int8, all of it."""
        return bool(self.pieces) and all(piece.scale is not None for piece in self.pieces)

    @property
    def is_mixed(self) -> bool:
        """Whether some of its pieces are int8 and others not; it is held in floating point."""
        return not self.is_int8 and any(piece.scale is not None for piece in self.pieces)

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
    problems = [*reader.problems]
    located = {
        target: _settle(reader, target, source, problems)
        for target, source in tensor_sources(spec, stage_slice).items()
    }
    problems += _find_lost_hot_columns(reader, located)
    problems += _judge_unknown(reader, spec, has_problems=bool(problems))
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        is_quantized = any(_OF_OTHER_FORMS.search(name) for name in reader.names)
        advice = (
            "these are quantized weights or an adapter, which are not read: give the original model"
            if is_quantized
            else "check that config and weights belong together"
        )
        raise ValueError(
            f"{reader.folder}: checkpoint must fit its config.json, got {len(problems)} "
            f"problem(s): {'; '.join(problems[:_SHOWN])}{more}; {advice}"
        )
    _warn_of_mixed(reader, located)
    return located


def _warn_of_mixed(reader: CheckpointReader, located: dict[str, Located]) -> None:
    mixed = [target for target, entry in located.items() if entry.is_mixed]
    if mixed:
        more = ", ..." if len(mixed) > _NAMED else ""
        warn_once(
            logger,
            f"{reader.folder}: {len(mixed)} matrices are made of int8 and floating-point tensors "
            f"and stay in floating point as a whole: {', '.join(mixed[:_NAMED])}{more}",
        )


def _find_lost_hot_columns(reader: CheckpointReader, located: dict[str, Located]) -> list[str]:
    """Finds linears without the hot columns of config.json; int8 weights leave those out."""
    path = reader.folder / "config.json"
    fields = read_json(path) if path.is_file() else {}
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


def _judge_unknown(reader: CheckpointReader, spec: ModelSpec, has_problems: bool) -> list[str]:
    """Returns unknown tensors that are problems; warns of others, which transformers ignores too.

    Where something else is wrong, any unknown tensor may be what is missing, under another name.
    """
    unknown = _find_unknown(reader, spec)
    wrong = [name for name in unknown if has_problems or _belongs_to_a_weight(name)]
    passed_over = [name for name in unknown if name not in wrong]
    if passed_over:
        more = ", ..." if len(passed_over) > _NAMED else ""
        warn_once(
            logger,
            f"{reader.folder}: {len(passed_over)} tensor(s) that a {spec.model_type} model of this "
            f"config.json does not have are passed over, as in transformers: "
            f"{', '.join(passed_over[:_NAMED])}{more}",
        )
    return [f"unknown tensor {name}" for name in wrong]


def _belongs_to_a_weight(name: str) -> bool:
    return bool(_OF_OTHER_FORMS.search(name) or _OF_OURS.search(name))


def _find_unknown(reader: CheckpointReader, spec: ModelSpec) -> list[str]:
    whole = tensor_sources(spec, StageSlice.whole(spec))
    known = {name for source in whole.values() for names in source.names for name in names}
    for name in list(known):
        if name in reader and reader.dtype(name) == "I8":
            base = name.removesuffix("weight")
            known |= {base + kind for kind in ("col_scale", "hot_columns", "hot_weight")}
            known |= {base + kind for kind in ("SCB", "weight_format")}
    ignored = re.compile("|".join(ignored_tensors(spec)) or r"(?!)")
    return [name for name in reader.names if name not in known and not ignored.search(name)]


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
            problems.append(
                f"{name} must be of a dtype that is read ({', '.join(FLOATING)}), got "
                f"{reader.dtype(name)}"
            )
        pieces.append(Piece(name, shape))
        hot.append(None)
    if len({piece.scale is None for piece in pieces}) > 1:
        if any(columns is not None for columns in hot):
            problems.append(
                f"{', '.join(piece.name for piece in pieces)} must be all int8 or all "
                "floating-point where one has hot columns, because they make one matrix here"
            )
        return Located(source, tuple(pieces))
    columns = hot[0] if hot else None
    if any(_as_list(other) != _as_list(columns) for other in hot):
        problems.append(
            f"{', '.join(piece.name for piece in pieces)} must have the same hot columns, because "
            "they make one matrix here"
        )
    return Located(source, tuple(pieces), columns)


def _as_list(columns: Tensor | None) -> list[int] | None:
    return None if columns is None else columns.tolist()
