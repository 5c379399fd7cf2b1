"""int8 matrices in the tiled layouts of cublasLt, for import from and export to old checkpoints.

Row-major [rows, cols] is the one layout this package computes with. bitsandbytes before 0.45 stored
weights as `col32`, `col_turing` or `col_ampere`, and cublasLt transforms into the last two but not
back. The formulas are in csrc/include/dist_int8/layouts.h and, in plain torch, in `stored_offsets`:
COL32, COL4_4R2_8C and COL32_2R_4R4 of cublasLtOrder_t (NVIDIA's cuBLAS documentation).
"""

import torch
from torch import Tensor

from dist_int8.int8.library import load
from dist_int8.int8.registry import has_kernel

LAYOUTS = ("row", "col32", "col_turing", "col_ampere")
"""Names by number: the `weight_format` of bitsandbytes' state dicts."""

TILE_ROWS = {"row": 1, "col32": 1, "col_turing": 8, "col_ampere": 32}
TILE_COLS = {"row": 1, "col32": 32, "col_turing": 32, "col_ampere": 32}

_COMPILED = load() and has_kernel("transform_layout", "CPU")
_COMPILED_FOR_CUDA = _COMPILED and has_kernel("transform_layout", "CUDA")


def stored_shape(layout: str, rows: int, cols: int) -> tuple[int, int]:
    """Returns the shape of the contiguous tensor that holds a [rows, cols] matrix: whole tiles."""
    index = _index("layout", layout)
    tile_rows, tile_cols = TILE_ROWS[LAYOUTS[index]], TILE_COLS[LAYOUTS[index]]
    return -(-rows // tile_rows) * tile_rows, -(-cols // tile_cols) * tile_cols


def stored_offsets(layout: str, rows: int, cols: int, device: torch.device | None = None) -> Tensor:
    """int64 [rows, cols]: where element (r, c) lies in the flat storage of the layout."""
    stored_rows, _ = stored_shape(layout, rows, cols)
    r = torch.arange(rows, device=device)[:, None]
    c = torch.arange(cols, device=device)
    panel, k = c // 32 * (32 * stored_rows), c % 32
    if layout == "row":
        return r * cols + c
    if layout == "col32":
        return panel + r * 32 + k
    if layout == "col_turing":
        return panel + r // 8 * 256 + r % 2 * 128 + k // 4 * 16 + r % 8 // 2 * 4 + k % 4
    q = (r % 8 // 2 * 4 + r % 32 // 8) * 2 + r % 2
    return panel + r // 32 * 1024 + q * 32 + k


def transform_layout(
    x: Tensor, source: str, target: str, shape: tuple[int, int] | None = None
) -> Tensor:
    """int8 x in layout `source` -> the same matrix in layout `target`.

    Args:
        x: int8, contiguous, of the shape `stored_shape(source, *shape)`.
        source: a name of LAYOUTS.
        target: a name of LAYOUTS.
        shape: (rows, cols) of the matrix without padding; None: that of x.

    Returns:
        int8 of the shape `stored_shape(target, *shape)`, padding zero. Exact: transforming back
        gives x, with zeros for its padding.

    Raises:
        ValueError: unknown layouts, dtypes, and shapes that do not belong together.
    """
    rows, cols = x.shape if shape is None and x.dim() == 2 else shape or (0, 0)
    numbers = _index("source", source), _index("target", target)
    expected = stored_shape(source, rows, cols)
    if x.dtype != torch.int8 or tuple(x.shape) != expected:
        raise ValueError(
            f"transform_layout: x must be int8 {list(expected)}, the storage of "
            f"[rows={rows}, cols={cols}] as {source}, got {x.dtype} {list(x.shape)}; "
            "give the shape of the matrix without padding"
        )
    if (_COMPILED and x.is_cpu) or (_COMPILED_FOR_CUDA and x.is_cuda):
        return torch.ops.dist_int8.transform_layout(x.contiguous(), *numbers, rows, cols)
    flat = x.contiguous().flatten()
    out = x.new_zeros(stored_shape(target, rows, cols))
    matrix = flat[stored_offsets(source, rows, cols, x.device)]
    out.view(-1)[stored_offsets(target, rows, cols, x.device)] = matrix
    return out


def _index(argument: str, layout: str) -> int:
    if layout not in LAYOUTS:
        raise ValueError(
            f"transform_layout: {argument} must be one of {', '.join(LAYOUTS)}, got {layout!r}; "
            "bitsandbytes' weight_format is the index of a name"
        )
    return LAYOUTS.index(layout)
