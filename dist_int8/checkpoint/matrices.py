"""A stored parameter as a sequence of slices, floating or in int8."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_int8.checkpoint.piece import Piece
from dist_int8.checkpoint.reader import SLICE, CheckpointReader
from dist_int8.checkpoint.tensor_files import TORCH_DTYPES
from dist_int8.int8 import ops, reference
from dist_int8.int8.layouts import transform_layout
from dist_int8.int8.rotation import rotation_block


@dataclass(frozen=True)
class Int8Rows:
    """Some rows of an int8 matrix, starting at row `first` of their checkpoint tensor.

    Attributes:
        weight_int8: int8 [R, K], zero in the hot columns, unless it is rotated.
        col_scale: fp32 [R]
        hot_weight: floating [R, H]
    """

    first: int
    weight_int8: Tensor
    col_scale: Tensor
    hot_weight: Tensor | None


class Source:
    """Reads pieces of one checkpoint, on the CPU or from there to a device.

    The next slice reuses the buffers of a slice: copy what you keep. Fresh memory for every slice
    would cost more in page faults than the work itself.

    Args:
        reader: of the checkpoint.
        device: where slices are processed and returned.
        progress: called with the number of bytes just read, once for each byte of a tensor.

    Reading raises ValueError at the first NaN or infinity, with the tensor's name.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        device: torch.device | str = "cpu",
        progress: Callable[[int], object] | None = None,
    ) -> None:
        self.reader = reader
        self._device = torch.device(device)
        self._progress = progress
        self._reported: set[str] = set()

    def read(self, name: str) -> Tensor:
        """Reads a whole (small) tensor."""
        tensor = self.reader.read(name)
        self._report(name, tensor, whole=True)
        return tensor.to(self._device)

    def floating(self, piece: Piece, hot_columns: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """Yields rows in order, in `reader.float_dtype`, or in fp32 if stored in int8."""
        if piece.scale is None:
            for first, rows in self._weight_slices(piece.name):
                self._check_finite(piece.name, first, rows)
                yield first, rows
            return
        for part in self._stored_int8(piece):
            rows = reference.dequantize_weight(
                part.weight_int8, part.col_scale, rotation=piece.rotation
            )
            if hot_columns is not None and part.hot_weight is not None:
                rows[:, hot_columns.long().to(rows.device)] = part.hot_weight.float()
            yield part.first, rows

    def int8(
        self, piece: Piece, hot_columns: Tensor | None = None, rotation: int = 0
    ) -> Iterator[Int8Rows]:
        """Yields rows in order as int8: as they are stored, or quantized as they arrive.

        A floating piece keeps `hot_columns` exactly, leaves them out of the scales and is rotated.
        """
        if piece.scale is not None:
            yield from self._stored_int8(piece)
            return
        hot = None if hot_columns is None else hot_columns.to(self._device)
        for first, rows in self._weight_slices(piece.name):
            part = quantize_rows_of_weight(first, rows, hot, rotation)
            if part.hot_weight is not None:
                self._check_finite(piece.name, first, part.hot_weight)
            self._check_finite(piece.name, first, part.col_scale)  # NaN where one is not finite
            yield part

    def _stored_int8(self, piece: Piece) -> Iterator[Int8Rows]:
        assert piece.scale is not None
        scale = self.read(piece.scale)
        self._check_finite(piece.scale, 0, scale)
        if len(scale) and scale.min() < 0:
            raise ValueError(
                f"{self.reader.folder}:{piece.scale}: scales must be at least 0, got "
                f"{scale.min().item():g}; repair the checkpoint"
            )
        if piece.scale_divisor != 1.0:
            scale = scale / piece.scale_divisor
        hot_weight = None
        if piece.hot_weight is not None:
            hot_weight = self.read(piece.hot_weight)
            self._check_finite(piece.hot_weight, 0, hot_weight)
        for name in piece.extra:
            self._report(name, None)
        slices = self._slices(piece.name) if piece.layout == "row" else self._from_layout(piece)
        for first, rows in slices:
            end = first + len(rows)
            hot = None if hot_weight is None else hot_weight[first:end]
            yield Int8Rows(first, rows, scale[first:end], hot)

    def _from_layout(self, piece: Piece) -> Iterator[tuple[int, Tensor]]:
        """Yields rows of a tiled matrix, which is read whole: its rows are spread over the file."""
        num_rows, num_columns = piece.shape
        tiled = self.read(piece.name)
        matrix = transform_layout(tiled, piece.layout, "row", (num_rows, num_columns))
        del tiled
        yield from _split_rows(matrix)

    def _weight_slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yields rows of a weight that is not int8, in its floating dtype."""
        dtype = TORCH_DTYPES[self.reader.float_dtype(name)]
        for first, rows in self._slices(name):
            yield first, rows.to(dtype)

    def _slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        for first, rows in self.reader.slices(name):
            self._report(name, rows)
            yield first, rows.to(self._device)
        self._reported.add(name)

    def _check_finite(self, name: str, first: int, rows: Tensor) -> None:
        # A sum is much cheaper than isfinite(), and is not finite where an element is not.
        if math.isfinite(rows.sum().item()) or rows.isfinite().all():
            return
        raise ValueError(
            f"{self.reader.folder}:{name}: weights must be finite, got NaN or Inf within rows "
            f"{first}..{first + len(rows) - 1}; repair the checkpoint"
        )

    def _report(self, name: str, rows: Tensor | None, whole: bool = False) -> None:
        if name in self._reported:
            return
        if rows is None or whole:
            self._reported.add(name)
        num_bytes = self.reader.num_bytes(name) if rows is None else rows.nbytes
        if self._progress is not None and num_bytes:
            self._progress(num_bytes)


def quantize_rows_of_weight(
    first: int, rows: Tensor, hot_columns: Tensor | None, rotation: int
) -> Int8Rows:
    """Quantizes rows of a weight as `Int8Linear.quantize_` does, bit for bit.

    A row of a weight is quantized like a row of x without outliers, by the same kernel; only the
    rotation of a weight is divided by its block size, exactly.
    """
    quantized = ops.quantize_rows(rows, "none", 0.0, hot_columns, rotation)
    col_scale = quantized.row_scale / rotation_block(rows.shape[1], rotation)
    is_zero = col_scale < reference.SMALLEST_SCALE
    weight_int8 = quantized.x_int8
    if is_zero.any():
        col_scale = col_scale.masked_fill(is_zero, 0.0)
        weight_int8 = weight_int8.masked_fill(is_zero[:, None], 0)
    hot_weight = None if hot_columns is None else quantized.x_hot
    return Int8Rows(first, weight_int8, col_scale, hot_weight)


def _split_rows(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, SLICE // max(1, torch.Size(matrix.shape[1:]).numel()))
    for first in range(0, len(matrix), step):
        yield first, matrix[first : first + step]
