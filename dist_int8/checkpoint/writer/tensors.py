"""Making the tensors of a rewritten checkpoint, one recipe at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_int8.checkpoint.matrices import Source
from dist_int8.checkpoint.stored_int8 import ABSMAX_PER_SCALE
from dist_int8.checkpoint.tensor_files import TORCH_DTYPES
from dist_int8.checkpoint.writer.recipe import Recipe
from dist_int8.int8 import reference

Made = Iterator[tuple[int, int, Tensor]]
"""(which of the recipe's outputs, first row, rows), in any order, each row once."""


def make_tensors(recipe: Recipe, source: Source, hot_columns: Tensor | None) -> Made:
    """Makes the outputs of a recipe, whose hot columns [H] are known by now."""
    if recipe.form == "floating":
        return _make_floating(recipe, source, hot_columns)
    if recipe.form == "bitsandbytes":
        return _make_bitsandbytes(recipe, source, hot_columns)
    return _make_int8(recipe, source, hot_columns)


def _make_floating(recipe: Recipe, source: Source, hot_columns: Tensor | None) -> Made:
    dtype = TORCH_DTYPES[recipe.outputs[0].dtype]
    for first, rows in source.floating(recipe.piece, hot_columns):
        yield 0, first, rows.to(dtype).cpu()


def _make_int8(recipe: Recipe, source: Source, hot_columns: Tensor | None) -> Made:
    number = 2  # of the output that comes next, as `list_int8_outputs` lists them
    if recipe.rotation:
        yield number, 0, torch.tensor(recipe.rotation, dtype=torch.int32)
        number += 1
    for part in source.int8(recipe.piece, hot_columns, recipe.rotation):
        yield 0, part.first, part.weight_int8.cpu()
        yield 1, part.first, part.col_scale.cpu()
        if part.hot_weight is not None:
            yield number, part.first, part.hot_weight.cpu()
    if hot_columns is not None:
        yield number + 1, 0, hot_columns


def _make_bitsandbytes(recipe: Recipe, source: Source, hot_columns: Tensor | None) -> Made:
    """bitsandbytes has neither rotation nor hot columns: the whole is quantized without them."""

    def quantize() -> Iterator[tuple[int, Tensor, Tensor]]:
        if hot_columns is None and not recipe.piece.rotation:
            for part in source.int8(recipe.piece):
                yield part.first, part.weight_int8, part.col_scale
        else:
            for first, rows in source.floating(recipe.piece, hot_columns):
                yield first, *reference.quantize_weight(rows)

    for first, weight_int8, col_scale in quantize():
        yield 0, first, weight_int8.cpu()
        yield 1, first, col_scale.cpu() * ABSMAX_PER_SCALE
    yield 2, 0, torch.zeros((), dtype=torch.uint8)
