"""Layout transforms: the published formulas, exact inverses, padding, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_int8.int8 import layouts
from dist_int8.int8.layouts import LAYOUTS, stored_offsets, stored_shape, transform_layout

TILED = LAYOUTS[1:]
sizes = st.integers(1, 150)


def matrix(rows, cols, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (rows, cols), generator=generator, dtype=torch.int8)


# The formulas as cuBLAS documents cublasLtOrder_t, element by element: columns of a tile first.
def documented_offset(layout, row, col, rows):
    """`col` and `row` 0-based; the leading dimension is the distance between 32-column panels."""
    if layout == "col32":
        leading = 32 * rows
        return (col // 32) * leading + 32 * row + col % 32
    if layout == "col_turing":  # COL4_4R2_8C: panels of composite 8 x 32 tiles
        leading = 32 * ((rows + 7) // 8 * 8)
        tile = (row // 8) * 256
        inner_row, inner_col = row % 8, col % 32
        # even rows fill the first half of a tile, odd rows the second, in 4 x 4 blocks
        half = 128 if inner_row % 2 else 0
        return (
            (col // 32) * leading
            + tile
            + half
            + (inner_col // 4) * 16
            + (inner_row // 2) * 4
            + inner_col % 4
        )
    leading = 32 * ((rows + 31) // 32 * 32)  # COL32_2R_4R4
    row_in_tile, col_in_tile = row % 32, col % 32
    within = (
        ((row_in_tile % 8) // 2 * 4 + row_in_tile // 8) * 2 + row_in_tile % 2
    ) * 32 + col_in_tile
    return (col // 32) * leading + (row // 32) * 1024 + within


@pytest.mark.parametrize("layout", TILED)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (8, 32), (32, 32), (40, 70), (65, 33)])
def test_every_element_lies_where_cublaslt_documents_it(layout, rows, cols):
    x = matrix(rows, cols)
    stored = transform_layout(x, "row", layout).flatten()
    for r in range(rows):
        for c in range(cols):
            offset = documented_offset(layout, r, c, rows)
            assert stored[offset] == x[r, c], (r, c)
            assert stored_offsets(layout, rows, cols)[r, c] == offset
    assert stored.count_nonzero() == x.count_nonzero()  # padding is zero


@pytest.mark.parametrize("layout", TILED)
def test_a_tile_by_hand(layout):
    """First offsets of the second row and of the first odd positions, counted on paper."""
    offsets = stored_offsets(layout, 32, 64)
    expected = {
        "col32": {(0, 31): 31, (1, 0): 32, (2, 0): 64, (8, 0): 256, (0, 32): 1024},
        "col_turing": {(0, 4): 16, (1, 0): 128, (2, 0): 4, (7, 31): 255, (8, 0): 256},
        "col_ampere": {(0, 31): 31, (1, 0): 32, (8, 0): 64, (2, 0): 256, (31, 31): 1023},
    }[layout]
    assert {place: int(offsets[place]) for place in expected} == expected


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
@settings(max_examples=40, deadline=None)
@given(rows=sizes, cols=sizes, seed=st.integers(0, 3))
def test_transforms_are_exact_and_invert(source, target, rows, cols, seed):
    x = matrix(rows, cols, seed)
    stored = transform_layout(x, "row", source)
    assert stored.shape == stored_shape(source, rows, cols)
    there = transform_layout(stored, source, target, (rows, cols))
    assert torch.equal(there, transform_layout(x, "row", target))
    assert torch.equal(transform_layout(there, target, source, (rows, cols)), stored)
    assert torch.equal(transform_layout(there, target, "row", (rows, cols)), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None)
@given(rows=sizes, cols=sizes)
def test_offsets_are_distinct_and_inside_the_storage(layout, rows, cols):
    offsets = stored_offsets(layout, rows, cols).flatten()
    stored_rows, stored_cols = stored_shape(layout, rows, cols)
    assert offsets.unique().numel() == rows * cols
    assert offsets.min() >= 0 and offsets.max() < stored_rows * stored_cols


@pytest.mark.parametrize("layout", TILED)
def test_garbage_in_the_padding_of_the_source_goes_nowhere(layout):
    x = matrix(13, 45)
    stored = torch.full(stored_shape(layout, 13, 45), 99, dtype=torch.int8)
    stored.view(-1)[stored_offsets(layout, 13, 45)] = x
    assert torch.equal(transform_layout(stored, layout, "row", (13, 45)), x)
    for target in TILED:
        again = transform_layout(stored, layout, target, (13, 45))
        assert torch.equal(again, transform_layout(x, "row", target))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_torch_equals_the_kernel(layout, monkeypatch):
    x = matrix(70, 100)
    stored = transform_layout(x, "row", layout)
    monkeypatch.setattr(layouts, "_COMPILED", False)
    assert torch.equal(transform_layout(x, "row", layout), stored)
    assert torch.equal(transform_layout(stored, layout, "row", (70, 100)), x)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_matrices(layout, shape):
    x = torch.empty(shape, dtype=torch.int8)
    stored = transform_layout(x, "row", layout)
    assert tuple(stored.shape) == stored_shape(layout, *shape) and not stored.any()
    assert transform_layout(stored, layout, "row", shape).shape == shape


def test_errors_say_what_was_expected():
    x = matrix(8, 32)
    with pytest.raises(ValueError, match="source must be one of row, col32"):
        transform_layout(x, "col_hopper", "row")
    with pytest.raises(ValueError, match=r"x must be int8 \[32, 32\]"):
        transform_layout(x, "col_ampere", "row")
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        transform_layout(x.float(), "row", "col32")


@pytest.mark.skipif(not layouts._COMPILED, reason="the library is not built")
class TestCompiledOp:
    def test_opcheck(self):
        for source in range(4):
            stored = torch.zeros(stored_shape(LAYOUTS[source], 40, 50), dtype=torch.int8)
            torch.library.opcheck(
                torch.ops.dist_int8.transform_layout.default, (stored, source, 2, 40, 50)
            )

    def test_compiles_into_one_graph(self):
        x = matrix(33, 40)
        compiled = torch.compile(
            lambda x: transform_layout(x, "row", "col_turing"), fullgraph=True, backend="eager"
        )
        assert torch.equal(compiled(x), transform_layout(x, "row", "col_turing"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((torch.zeros(2, 2, dtype=torch.int8), 4, 0, 2, 2), "source must be 0"),
            ((torch.zeros(2, 2, dtype=torch.int8), 0, -1, 2, 2), "target must be 0"),
            ((torch.zeros(2, 2, dtype=torch.int8), 1, 0, 2, 2), r"x must be \[.*=2, .*=32\]"),
            ((torch.zeros(2, 2), 0, 1, 2, 2), "x must be int8"),
            ((torch.zeros(2, 2, dtype=torch.int8), 0, 1, -1, 2), "rows and cols must be"),
        ],
    )
    def test_the_op_checks_its_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            torch.ops.dist_int8.transform_layout(*arguments)
