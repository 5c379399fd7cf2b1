"""One stored tensor and the tensors that are made from it, as data."""

from dataclasses import dataclass, field

from torch import Tensor

from dist_int8.checkpoint.piece import Piece
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.checkpoint.writer.shards import Output
from dist_int8.checkpoint.writer.target import TargetFormat


@dataclass(frozen=True)
class Recipe:
    """Tensors that are made together, from one stored tensor and what belongs to it.

    Attributes:
        hot_columns: int32 [H], as stored or chosen; None: none, or calibration finds them.
        rotation: requested size of the rotation of an int8 matrix that is made; 0: none.
        calibrated: our name of the linear ("blocks.0.qkv"), if calibration finds its hot columns.
    """

    form: TargetFormat
    piece: Piece
    outputs: tuple[Output, ...]
    hot_columns: Tensor | None = field(compare=False)
    rotation: int = 0
    calibrated: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that are made."""
        return sum(output.num_bytes for output in self.outputs)


def list_floating_outputs(
    reader: CheckpointReader, piece: Piece, name: str, dtype: str | None
) -> tuple[Output, ...]:
    """Lists the one tensor of the floating form; dtype None: as it is worked on."""
    return (Output(name, dtype or reader.float_dtype(piece.name), piece.shape),)


def list_int8_outputs(
    reader: CheckpointReader, piece: Piece, name: str, num_hot_columns: int | None, rotation: int
) -> tuple[Output, ...]:
    """Lists the tensors of our form.

    weight and its scales, the rotation if it has one and, with hot columns, those and their
    weights.
    """
    base = name.removesuffix("weight")
    num_rows = piece.shape[0]
    scale = f"{base}rotated_scale" if rotation else f"{base}col_scale"
    outputs = [Output(name, "I8", piece.shape), Output(scale, "F32", (num_rows,))]
    if rotation:
        outputs.append(Output(f"{base}rotation", "I32", ()))
    if num_hot_columns is not None:
        hot_dtype = reader.float_dtype(piece.hot_weight or piece.name)
        outputs.append(Output(f"{base}hot_weight", hot_dtype, (num_rows, num_hot_columns)))
        outputs.append(Output(f"{base}hot_columns", "I32", (num_hot_columns,)))
    return tuple(outputs)


def list_bitsandbytes_outputs(piece: Piece, name: str) -> tuple[Output, ...]:
    """Lists the tensors of bitsandbytes' form: weight in rows, SCB, weight_format."""
    base = name.removesuffix("weight")
    return (
        Output(name, "I8", piece.shape),
        Output(f"{base}SCB", "F32", piece.shape[:1]),
        Output(f"{base}weight_format", "U8", ()),
    )
