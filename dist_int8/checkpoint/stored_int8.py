"""An int8 matrix in a checkpoint: its layout, scales and hot columns, or all that is wrong.

A matrix `X.weight` is stored in one of three forms:

- floating;
- ours: int8 `X.weight`, fp32 `X.col_scale` [N], and where it has hot columns int32 `X.hot_columns`
  [H] and floating `X.hot_weight` [N, H]. A rotated one has `X.rotated_scale` [N] in the place of
  col_scale, which releases that know no rotation miss, and int32 `X.rotation`, its requested size;
- bitsandbytes': int8 `X.weight` in the layout that `X.weight_format` numbers (row where absent),
  and fp32 `X.SCB` [N], the absmax of each row: 127 times our scale.
"""

import torch
from torch import Tensor

from dist_int8.checkpoint.piece import Piece
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.int8.layouts import LAYOUTS, stored_shape
from dist_int8.int8.rotation import LARGEST_ROTATION, check_rotation

_HOT_DTYPES = ("F32", "F16", "BF16")
_SCALES = ("col_scale", "rotated_scale", "SCB")
ABSMAX_PER_SCALE = 127.0
_INTEGERS = ("U8", "I8", "I16", "I32", "I64")


class StoredInt8:
    """An int8 matrix and the tensors that stand beside it.

    Args:
        reader: of the checkpoint.
        name: of the int8 tensor, `X.weight`.
        shape: [N, K] of the matrix, without the padding of its layout.
        problems: gets a sentence for everything that is wrong.
    """

    def __init__(
        self, reader: CheckpointReader, name: str, shape: tuple[int, ...], problems: list[str]
    ) -> None:
        self._reader = reader
        self._name = name
        self._base = name.removesuffix("weight")
        self._shape = shape
        self._problems = problems

    def settle(self) -> tuple[Piece, Tensor | None]:
        """Checks everything; returns the piece and its hot columns, int32 [H]."""
        layout = self._read_layout()
        self._check_shape(layout)
        scale = self._choose_scale()
        columns = self._find_hot_columns()
        rotation = self._read_rotation()
        read = [f"{self._base}{kind}" for kind in ("weight_format", "rotation") if self._has(kind)]
        if self._has("hot_columns") and self._has("hot_weight"):
            read.append(f"{self._base}hot_columns")
        divisor = ABSMAX_PER_SCALE if scale.endswith("SCB") else 1.0
        hot_weight = None if columns is None else f"{self._base}hot_weight"
        piece = Piece(
            self._name, self._shape, scale, divisor, layout, tuple(read), hot_weight, rotation
        )
        return piece, columns

    def _has(self, kind: str) -> bool:
        return self._base + kind in self._reader

    def _read_layout(self) -> str:
        if not self._has("weight_format"):
            return "row"
        name = f"{self._base}weight_format"
        is_number = torch.Size(self._reader.shape(name)).numel() == 1
        is_number = is_number and self._reader.dtype(name) in _INTEGERS
        number = int(self._reader.read(name).reshape(-1)[0]) if is_number else -1
        if not 0 <= number < len(LAYOUTS):
            self._problems.append(f"{name} must be an integer 0..{len(LAYOUTS) - 1}")
            return "row"
        return LAYOUTS[number]

    def _check_shape(self, layout: str) -> None:
        expected = stored_shape(layout, *self._shape)
        got = self._reader.shape(self._name)
        if got != expected:
            kind = "" if layout == "row" else f" ({layout})"
            self._problems.append(
                f"{self._name} must have shape {list(expected)}{kind}, got {list(got)}"
            )

    def _choose_scale(self) -> str:
        """Returns the name of the scales."""
        base = self._base
        scales = [base + kind for kind in _SCALES if self._has(kind)]
        if len(scales) != 1:
            have = " and ".join(scales) or "none"
            self._problems.append(
                f"{self._name} is int8 and must have {base}col_scale, {base}rotated_scale or "
                f"{base}SCB, got {have}"
            )
        for scale in scales:
            self._expect(scale, ("F32",), self._shape[:1])
        return scales[0] if scales else f"{base}col_scale"

    def _read_rotation(self) -> int:
        """Returns the requested size of the rotation; 0 where the matrix is not rotated."""
        name, scale = f"{self._base}rotation", f"{self._base}rotated_scale"
        if self._has("rotation") != self._has("rotated_scale"):
            self._problems.append(f"{self._name} must have both of {scale} and {name} or neither")
        if not self._has("rotation"):
            return 0
        before = len(self._problems)
        self._expect(name, ("I32",), ())
        if len(self._problems) > before:
            return 0
        rotation = int(self._reader.read(name))
        try:
            check_rotation(rotation)
        except ValueError:
            rotation = 0
        if rotation == 0:
            self._problems.append(
                f"{name} must be a power of two from 2 to {LARGEST_ROTATION}, got "
                f"{int(self._reader.read(name))}"
            )
        return rotation

    def _find_hot_columns(self) -> Tensor | None:
        names = [f"{self._base}hot_columns", f"{self._base}hot_weight"]
        if all(name in self._reader for name in names):
            return self._read_hot_columns(*names)
        if any(name in self._reader for name in names):
            self._problems.append(
                f"{self._name} must have both of {' and '.join(names)} or neither"
            )
        return None

    def _read_hot_columns(self, columns_name: str, weight_name: str) -> Tensor | None:
        before = len(self._problems)
        num_rows, num_columns = self._shape
        self._expect(columns_name, ("I32",), None)
        shape = self._reader.shape(columns_name)
        num_hot = shape[0] if len(shape) == 1 else -1
        if num_hot < 1:
            self._problems.append(f"{columns_name} must have shape [H], got {shape}")
        self._expect(weight_name, _HOT_DTYPES, (num_rows, max(num_hot, 1)))
        if len(self._problems) > before:
            return None
        columns = self._reader.read(columns_name)
        if columns.min() < 0 or columns.max() >= num_columns or len(columns.unique()) != num_hot:
            self._problems.append(
                f"{columns_name} must be distinct input features 0..{num_columns - 1}, got "
                f"{columns.tolist()}"
            )
        return columns

    def _expect(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None) -> None:
        got, dtype = self._reader.shape(name), self._reader.dtype(name)
        if shape is not None and got != shape:
            self._problems.append(f"{name} must have shape {list(shape)}, got {list(got)}")
        if dtype not in dtypes:
            self._problems.append(f"{name} must be {' or '.join(dtypes)}, got {dtype}")
