"""A stored parameter as a sequence of slices, floating or in int8."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_int8.checkpoint.piece import Piece
from dist_int8.checkpoint.reader import SLICE, CheckpointReader
from dist_int8.checkpoint.tensor_files import TORCH_DTYPES
from dist_int8.int8 import reference
from dist_int8.int8.layouts import transform_layout


@dataclass(frozen=True)
class Int8Rows:
    """Some rows of an int8 matrix, starting at row `first` of their checkpoint tensor.

    Attributes:
        weight_int8: int8 [R, K], zero in the hot columns.
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
        self._quantizer = _Quantizer()

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
            rows = reference.dequantize_weight(part.weight_int8, part.col_scale)
            if hot_columns is not None and part.hot_weight is not None:
                rows[:, hot_columns.long().to(rows.device)] = part.hot_weight.float()
            yield part.first, rows

    def int8(self, piece: Piece, hot_columns: Tensor | None = None) -> Iterator[Int8Rows]:
        """Yields rows in order as int8: as they are stored, or quantized as they arrive.

        A floating piece keeps `hot_columns` exactly and leaves them out of the scales.
        """
        if piece.scale is not None:
            yield from self._stored_int8(piece)
            return
        hot = None if hot_columns is None else hot_columns.long().to(self._device)
        for first, rows in self._weight_slices(piece.name):
            hot_weight = None
            if hot is not None:
                hot_weight = rows[:, hot]
                rows.index_fill_(1, hot, 0.0)
                self._check_finite(piece.name, first, hot_weight)
            weight_int8, col_scale = self._quantizer(rows)
            self._check_finite(piece.name, first, col_scale)  # NaN where a weight is not finite
            yield Int8Rows(first, weight_int8, col_scale, hot_weight)

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


class _Quantizer:
    """Quantizes like `reference.quantize_weight`, bit for bit, in memory that it reuses."""

    def __init__(self) -> None:
        self._values = torch.empty(0)
        self._weight_int8 = torch.empty(0, dtype=torch.int8)

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self._values.numel() < rows.numel() or self._values.device != rows.device:
            self._values = torch.empty(rows.numel(), dtype=torch.float32, device=rows.device)
            self._weight_int8 = torch.empty_like(self._values, dtype=torch.int8)
        values = self._values[: rows.numel()].view(rows.shape).copy_(rows)
        # two passes, but 25 times as fast on a CPU as aminmax
        absmax = torch.maximum(values.amax(dim=1), -values.amin(dim=1))
        col_scale = absmax / reference.PLANE_MAX
        col_scale = torch.where(col_scale < reference.SMALLEST_SCALE, 0.0, col_scale)
        is_finite = col_scale.isfinite()
        col_scale = torch.where(is_finite, col_scale, torch.nan)
        values.div_(torch.where(col_scale > 0, col_scale, torch.inf)[:, None]).round_()
        if not is_finite.all():
            values[~is_finite] = 0.0
        return self._weight_int8[: rows.numel()].view(rows.shape).copy_(values), col_scale


def _split_rows(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, SLICE // max(1, torch.Size(matrix.shape[1:]).numel()))
    for first in range(0, len(matrix), step):
        yield first, matrix[first : first + step]
