"""Where a checkpoint stores every parameter of a stage and in which form, or all that is wrong."""

import logging
import re
from pathlib import Path

from torch import Tensor

from dist_int8.checkpoint.declared import find_contradictions
from dist_int8.checkpoint.located import Located
from dist_int8.checkpoint.piece import Piece
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.checkpoint.stored_int8 import StoredInt8
from dist_int8.checkpoint.tensor_files import FLOATING
from dist_int8.models.config import ignored_tensors, tensor_sources
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
_BESIDE_INT8 = (
    *("col_scale", "rotated_scale", "rotation", "hot_columns", "hot_weight"),
    *("SCB", "weight_format"),
)
_OF_OURS = re.compile(rf"(^|\.)({'|'.join(_BESIDE_INT8)}|CB)$")

logger = logging.getLogger(__name__)


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
    problems += find_contradictions(reader, located)
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
            known |= {base + kind for kind in _BESIDE_INT8}
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
    if len({piece.rotation for piece in pieces}) > 1:
        problems.append(
            f"{', '.join(piece.name for piece in pieces)} must have the same rotation, because "
            "they make one matrix here"
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
