"""Making the tensors of a rewritten checkpoint, one stored tensor and its company at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_int8.checkpoint.locate import ABSMAX_PER_SCALE, Piece
from dist_int8.checkpoint.matrices import Source
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.checkpoint.tensor_files import TORCH_DTYPES
from dist_int8.checkpoint.writer.shards import Group, Output
from dist_int8.int8 import reference

Made = Iterator[tuple[int, int, Tensor]]


def floating_group(
    reader: CheckpointReader,
    device: torch.device | str,
    piece: Piece,
    name: str,
    columns: Tensor | None,
    dtype: str | None,
) -> Group:
    """One floating tensor `name`; dtype None: as stored."""
    written = dtype or reader.dtype(piece.name)

    def make() -> Made:
        for first, rows in Source(reader, device).floating(piece, columns):
            yield 0, first, rows.to(TORCH_DTYPES[written]).cpu()

    return Group((Output(name, written, piece.shape),), make)


def int8_group(
    reader: CheckpointReader,
    device: torch.device | str,
    piece: Piece,
    name: str,
    columns: Tensor | None,
) -> Group:
    """Our form: weight, col_scale and, with hot columns [H], hot_columns and hot_weight."""
    base = name.removesuffix("weight")
    num_rows = piece.shape[0]
    outputs = [Output(name, "I8", piece.shape), Output(f"{base}col_scale", "F32", (num_rows,))]
    if columns is not None:
        hot_dtype = reader.dtype(piece.hot_weight or piece.name)
        outputs.append(Output(f"{base}hot_weight", hot_dtype, (num_rows, len(columns))))
        outputs.append(Output(f"{base}hot_columns", "I32", (len(columns),)))

    def make() -> Made:
        for part in Source(reader, device).int8(piece, columns):
            yield 0, part.first, part.weight_int8.cpu()
            yield 1, part.first, part.col_scale.cpu()
            if part.hot_weight is not None:
                yield 2, part.first, part.hot_weight.cpu()
        if columns is not None:
            yield 3, 0, columns

    return Group(tuple(outputs), make)


def bitsandbytes_group(
    reader: CheckpointReader,
    device: torch.device | str,
    piece: Piece,
    name: str,
    columns: Tensor | None,
) -> Group:
    """bitsandbytes' form: weight in rows, SCB, weight_format. Hot columns are quantized too."""
    base = name.removesuffix("weight")
    outputs = (
        Output(name, "I8", piece.shape),
        Output(f"{base}SCB", "F32", piece.shape[:1]),
        Output(f"{base}weight_format", "U8", ()),
    )

    def quantized(source: Source) -> Iterator[tuple[int, Tensor, Tensor]]:
        if columns is None:
            for part in source.int8(piece):
                yield part.first, part.weight_int8, part.col_scale
        else:
            for first, rows in source.floating(piece, columns):
                yield first, *reference.quantize_weight(rows)

    def make() -> Made:
        for first, weight_int8, col_scale in quantized(Source(reader, device)):
            yield 0, first, weight_int8.cpu()
            yield 1, first, col_scale.cpu() * ABSMAX_PER_SCALE
        yield 2, 0, torch.zeros((), dtype=torch.uint8)

    return Group(outputs, make)
