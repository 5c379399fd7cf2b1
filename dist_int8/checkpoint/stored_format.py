"""What a checkpoint holds, and what an int8 one has decided about how it is loaded."""

from dataclasses import dataclass
from pathlib import Path

from dist_int8.checkpoint.declared import read_declared
from dist_int8.checkpoint.locate import is_int8_checkpoint, locate, may_be_int8
from dist_int8.checkpoint.located import Located
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.checkpoint.tied_head import EMBEDDING, HEAD
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice


@dataclass(frozen=True)
class StoredFormat:
    """The form of a checkpoint, read from its headers.

    Attributes:
        is_int8: whether any matrix is int8.
        skip: linears that it holds in floating point, by name component.
        num_hot_columns: maximum number of hot columns in a linear of a block but `down`.
        down_hot_columns: maximum number in `down`.
        head_hot_columns: number of hot columns in the head.
        linear_size: maximum bytes per element of what linears of blocks hold in floating point.
        embedding_int8: whether the token embedding is int8.
        rotation: requested size of the rotation of the int8 linears; 0: not all are rotated.
        accuracy: named point of `config.accuracy` that it was made for; None: the default.
    """

    is_int8: bool
    skip: tuple[str, ...]
    num_hot_columns: int
    down_hot_columns: int
    head_hot_columns: int
    linear_size: int
    embedding_int8: bool
    rotation: int = 0
    accuracy: str | None = None


def read_stored_format(
    folder: str | Path, spec: ModelSpec, *, allow_pickle: bool = False
) -> StoredFormat:
    """Reads from the headers what the checkpoint holds.

    Raises:
        ValueError: as `load_stage`, for the whole model.
    """
    reader = CheckpointReader(folder, allow_pickle=allow_pickle, complete=False)
    located = locate(reader, spec, StageSlice.whole(spec))
    num_hot, num_in_down, sizes, rotations = [0], [0], [0], []
    for target, entry in located.items():
        if entry.hot_columns is not None and target != HEAD:
            counts = num_in_down if target.endswith(".down.weight") else num_hot
            counts.append(len(entry.hot_columns))
        if entry.is_int8 and target != EMBEDDING:
            rotations.append(entry.rotation)
        if target.startswith("blocks.") and may_be_int8(target, entry.source):
            names = list_floating_names(entry)
            sizes += [reader.common_dtype(names).itemsize] if names else []
    return StoredFormat(
        is_int8_checkpoint(reader),
        list_floating_linears(located),
        max(num_hot),
        max(num_in_down),
        0 if (columns := located[HEAD].hot_columns) is None else len(columns),
        max(sizes),
        located[EMBEDDING].is_int8,
        min(rotations, default=0),
        read_declared(reader.folder).get("accuracy"),
    )


def list_floating_linears(located: dict[str, Located]) -> tuple[str, ...]:
    """Lists the linears that the checkpoint holds in floating point, by our names."""
    return tuple(
        target.removesuffix(".weight")
        for target, entry in located.items()
        if target != EMBEDDING and may_be_int8(target, entry.source) and not entry.is_int8
    )


def list_floating_names(entry: Located) -> list[str]:
    """Lists the tensors of a weight that stay floating: hot weights, or what is not int8."""
    names = [piece.hot_weight if piece.scale is not None else piece.name for piece in entry.pieces]
    return [name for name in names if name is not None]
