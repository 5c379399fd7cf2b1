"""The specification of the int8 numerics in plain torch: slow, clear, the test of every kernel.

A linear layer y = x @ weight.T (x [M, K], weight [N, K]) runs on integers:

    weight[n, k] ~= col_scale[n] * weight_int8[n, k]
    x[m, k]      ~= row_scale[m] * (x_int8[m, k] + 128 * x_high[m, k])
    y[m, n]       = row_scale[m] * col_scale[n] * sum_k (x_int8 + 128 * x_high) * weight_int8

Both planes are int8 and both sums are exact. x and the weight may be rotated first (`rotation`),
which leaves their product as it is and no element of x much larger than the rest: then the first
plane is enough. Without, dynamic outliers, too large for the scale of their row, keep the same step
(`row_scale`) and spill over onto the second plane, 15 bits in all. Which elements are outliers is
decided in each row by that row alone, so no result depends on what else is in the batch.

Input features that are always large are hot columns: they leave x and the weight before anything
else, and are multiplied in floating point. A scale may also cover a group of input features instead
of all K (`activation_group`, `weight_group`).

The methods that the LLM.int8() paper (Dettmers et al. 2022, arXiv:2208.07339) compares are in
`paper_methods`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dist_int8.int8.checks import (
    check_matrix,
    check_outlier_rule,
    check_weight,
    refuse_gradients,
)
from dist_int8.int8.rotation import rotate

PLANE_MAX = 127  # largest magnitude on one plane
TWO_PLANES_MAX = 127 * 128  # largest magnitude on two planes: high = 127, low = 0
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it is subnormal: the row counts as zero
TILE = 64  # columns of x_high that share a bit of high_tiles
TILES_PER_WORD = 32


class QuantizedRows(NamedTuple):
    """What `quantize_rows` makes of x [M, K], and all that a product needs to know of it."""

    x_int8: Tensor  # int8 [M, K], low plane
    x_high: Tensor  # int8 [M, K], high plane: zero but for outliers; [0, K] under the rule "none"
    row_scale: Tensor  # fp32 [M], or [M, G] of G groups of features
    # int32 [M, ceil(K / 2048)]: bit (k / 64) % 32 of word k / 2048 says that x_high is not all zero
    # in the 64 columns around k, so that a kernel leaves out tiles without outliers; [0, ...] as
    # x_high is.
    high_tiles: Tensor
    x_hot: Tensor  # x.dtype [M, H]: x[:, hot_columns]; H = 0 without hot columns


def outlier_mask(x: Tensor, outlier_rule: str, outlier_threshold: float) -> Tensor:
    """Which elements of fp32 x [M, K] are outliers of their own row: bool [M, K].

    none: no element. all: every element. absolute: |x| >= threshold (the paper's rule, with 6.0).
    row_rms: |x| >= threshold * rms(row). The right-hand side is computed in fp64 and rounded to
    fp32 once; a kernel that sums otherwise may differ only on elements within a few fp32 steps of
    it.
    """
    rule = check_outlier_rule(outlier_rule, outlier_threshold)
    if rule == "none":
        return torch.zeros_like(x, dtype=torch.bool)
    if rule == "all":
        return torch.ones_like(x, dtype=torch.bool)
    if rule == "absolute":
        return x.abs() >= torch.tensor(outlier_threshold, dtype=torch.float32, device=x.device)
    mean_square = x.double().square().mean(dim=1, keepdim=True)
    return x.abs() >= (outlier_threshold * mean_square.sqrt()).float()


def quantize_weight(weight: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """Weight [N, K] (floating) -> weight_int8 int8 [N, K], col_scale fp32 [N].

    One scale per output feature (vector-wise quantization, section 3.1 of the paper):
    col_scale = absmax / 127 and weight_int8 = round_half_even(weight / col_scale), both in fp32.
    An all-zero row gives zeros and scale 0; a row with NaN or Inf gives zeros and scale NaN, so
    that what it computes is NaN. `group` > 0: the same for every `group` input features, and
    col_scale is [N, ceil(K / group)].
    """
    check_matrix("quantize_weight", "weight", weight)
    if group:
        parts = [quantize_weight(part) for part in weight.split(group, 1)]
        return torch.cat([q for q, _ in parts], 1), torch.stack([scale for _, scale in parts], 1)
    values = weight.float()
    col_scale = _divide(row_absmax(values), PLANE_MAX)  # keeps a NaN or an Inf of a row
    col_scale = torch.where(col_scale < SMALLEST_SCALE, 0.0, col_scale)
    col_scale = torch.where(col_scale.isfinite(), col_scale, math.nan)
    q = torch.where(col_scale[:, None] > 0, values / col_scale[:, None], 0.0).round()
    return q.to(torch.int8), col_scale


def dequantize_weight(
    weight_int8: Tensor,
    col_scale: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    rotation: int = 0,
    group: int = 0,
) -> Tensor:
    """weight_int8 [N, K], col_scale [N] (or [N, G] of groups) -> weight [N, K], rotated back.

    Before it is rotated back it is within col_scale / 2 of what was quantized.
    """
    scale = spread(col_scale, weight_int8.shape[1], group)
    return rotate(weight_int8.float() * scale, rotation).to(dtype)


def spread(scale: Tensor, num_features: int, group: int) -> Tensor:
    """Scales [M], or [M, G] of groups -> [M, 1], or [M, K]: one per element that it scales."""
    return scale.repeat_interleave(group, 1)[:, :num_features] if group else scale[:, None]


def quantize_rows(
    x: Tensor,
    outlier_rule: str,
    outlier_threshold: float,
    hot_columns: Tensor | None = None,
    rotation: int = 0,
    group: int = 0,
) -> QuantizedRows:
    """x [M, K] -> its planes, scales, flags of outlier tiles and hot columns.

    x ~= row_scale * (x_int8 + 128 * x_high), each element within row_scale / 2:

    1. x is widened to fp32. Hot columns (integer [H], distinct) are set to zero: they are computed
       in floating point, by `int8_linear`.
    2. `rotate`, which multiplies the row's length by the square root of the block size.
    3. row_scale = max(absmax of the row's non-outliers / 127, absmax of the row / 16256), divisions
       in fp32. The second term lets the largest outlier fit two planes; the rule "none" has only
       the first.
    4. q = round_half_even(x / row_scale), a true division in fp32.
    5. |q| <= 127: x_int8 = q, x_high = 0. Else x_high = round_half_even(q / 128) and
       x_int8 = q - 128 * x_high, in [-64, 64]. Under the rule "none" every |q| <= 127, and x_high
       and high_tiles have no rows.

    With `group` > 0 every `group` features have a row_scale of their own, [M, ceil(K / group)];
    what is an outlier is still decided over the whole row.

    A row whose scale would be below the smallest normal fp32 number 2**-126 (an all-zero row too)
    gives zeros and scale 0. A row with NaN or Inf outside the hot columns, or whose rotation leaves
    fp32, gives zeros and scale NaN. Neither touches another row.
    """
    check_matrix("quantize_rows", "x", x)
    refuse_gradients("quantize_rows", x)
    values = x.float()
    if hot_columns is not None:
        values = values.index_fill(1, hot_columns.long(), 0.0)
    values = rotate(values, rotation)
    finite = values.isfinite().all(dim=1)
    values = torch.where(finite[:, None], values, 0.0)

    outliers = outlier_mask(values, outlier_rule, outlier_threshold)
    decomposes = check_outlier_rule(outlier_rule, outlier_threshold) != "none"
    row_scale = _row_scale(values, outliers, decomposes, group)
    scale = spread(row_scale, x.shape[1], group)
    q = torch.where(scale > 0, values / scale, 0.0).round()
    high = torch.where(q.abs() <= PLANE_MAX, 0.0, (q / 128).round())
    low = q - 128 * high
    if not decomposes:
        high = high[:0]  # nothing spills over: no second plane
    return QuantizedRows(
        low.to(torch.int8),
        high.to(torch.int8),
        torch.where(finite if group == 0 else finite[:, None], row_scale, math.nan),
        high_tiles(high),
        x.new_empty(len(x), 0) if hot_columns is None else x[:, hot_columns.long()],
    )


def _row_scale(values: Tensor, outliers: Tensor, decomposes: bool, group: int) -> Tensor:
    if group:
        pairs = zip(values.split(group, 1), outliers.split(group, 1), strict=True)
        return torch.stack([_row_scale(*pair, decomposes, 0) for pair in pairs], 1)
    scale = _divide(row_absmax(values.masked_fill(outliers, 0.0)), PLANE_MAX)
    if decomposes:
        scale = torch.maximum(scale, _divide(row_absmax(values), TWO_PLANES_MAX))
    return torch.where(scale >= SMALLEST_SCALE, scale, 0.0)


def high_tiles(x_high: Tensor) -> Tensor:
    """x_high [M, K] -> int32 [M, ceil(K / 2048)], one bit per tile of 64 columns.

    Bit (k / 64) % 32 of word k / 2048 is set where the tile of column k is not all zero.
    """
    num_rows, num_features = x_high.shape
    num_words = -(-num_features // (TILE * TILES_PER_WORD))
    padding = num_words * TILE * TILES_PER_WORD - num_features
    nonzero = torch.nn.functional.pad(x_high != 0, (0, padding))
    tiles = nonzero.view(num_rows, num_words, TILES_PER_WORD, TILE).any(dim=3)
    bits = torch.arange(TILES_PER_WORD, device=x_high.device)
    words = (tiles.long() << bits).sum(dim=2)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def int8_linear(
    x: Tensor,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None = None,
    *,
    outlier_rule: str,
    outlier_threshold: float,
    hot_columns: Tensor | None = None,
    hot_weight: Tensor | None = None,
    rotation: int = 0,
    activation_group: int = 0,
    weight_group: int = 0,
) -> Tensor:
    """x [M, K] (fp32, bf16, fp16), weight_int8 [N, K], col_scale fp32 [N] -> y [M, N] in x's dtype.

    total = sum_k (x_int8 + 128 * x_high) * weight_int8, an exact integer, rounded to fp32 once;
    then in fp32 and in this order y = total * (row_scale * col_scale),
    y += x[:, hot_columns] @ hot_weight.T, y += bias; last the cast to x's dtype. `hot_columns` [H]
    and `hot_weight` [N, H] (floating) come together, and then those columns of `weight_int8` do not
    matter: they only ever meet zeros (with a rotation they do: they were zero before it). Their
    product is summed in fp64 here; a kernel may sum it in fp32, in an order of its own that is the
    same for every row. `weight_int8` is of the rotated weight where there is a `rotation`.

    With groups of features, of x or of the weight (col_scale [N, G]), there is a total per group,
    and each is multiplied by its own row_scale * col_scale before they are added, in fp64 here and
    in fp32, in ascending order, in a kernel.
    """
    check_matrix("int8_linear", "x", x)
    check_weight("int8_linear", weight_int8, x.shape[1])
    if (hot_columns is None) != (hot_weight is None):
        raise ValueError(
            "int8_linear: hot_columns and hot_weight must be given together, got one of them; "
            "give both or neither"
        )
    rows = quantize_rows(
        x, outlier_rule, outlier_threshold, hot_columns, rotation, activation_group
    )
    return int8_matmul(
        rows,
        weight_int8,
        col_scale,
        bias,
        hot_weight=hot_weight,
        activation_group=activation_group,
        weight_group=weight_group,
    )


def int8_matmul(
    rows: QuantizedRows,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None = None,
    *,
    hot_weight: Tensor | None = None,
    residual: Tensor | None = None,
    activation_group: int = 0,
    weight_group: int = 0,
) -> Tensor:
    """`int8_linear` of rows that are quantized already -> y [M, N] in x_hot's dtype.

    residual [M, N], in that dtype, is added last, in fp32, before the cast: y += residual. Raises
    ValueError for a weight of another shape, and for hot columns without their weights.
    """
    check_weight("int8_matmul", weight_int8, rows.x_int8.shape[1])
    refuse_gradients("int8_matmul", *rows, col_scale, bias, hot_weight, residual)
    num_hot = rows.x_hot.shape[1]
    if num_hot and hot_weight is None:
        raise ValueError(
            f"int8_matmul: hot_weight must be [N, H={num_hot}], got none; "
            "x_hot has that many hot columns"
        )
    if activation_group or weight_group:
        y = _grouped_product(rows, weight_int8, col_scale, activation_group, weight_group)
    else:
        y = integer_product(rows.x_int8, rows.x_high, weight_int8).float()
        y = y * (rows.row_scale[:, None] * col_scale)
    if hot_weight is not None:
        y = y + (rows.x_hot.double() @ hot_weight.double().T).float()
    if bias is not None:
        y = y + bias.float()
    if residual is not None:
        y = y + residual.float()
    return y.to(rows.x_hot.dtype)


def int8_weight_linear(
    x: Tensor,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [M, K] times weights in int8, activations as they are -> y [M, N] in x's dtype.

    y = sum_k x * weight_int8, here in fp64 and rounded to fp32 once; then in fp32 y *= col_scale,
    y += bias, y += residual [M, N]; last the cast. Outliers need no treatment: the only
    error is that of the weights. A kernel may sum in fp32.
    """
    check_matrix("int8_weight_linear", "x", x)
    check_weight("int8_weight_linear", weight_int8, x.shape[1])
    refuse_gradients("int8_weight_linear", x, col_scale, bias, residual)
    M, N = x.shape[0], weight_int8.shape[0]
    for argument, value, shape in (
        ("col_scale", col_scale, [N]),
        ("bias", bias, [N]),
        ("residual", residual, [M, N]),
    ):
        if value is not None and list(value.shape) != shape:
            raise ValueError(
                f"int8_weight_linear: {argument} must be {shape}, got {list(value.shape)}; "
                "check the shapes of this layer"
            )
    y = (x.double() @ weight_int8.double().T).float() * col_scale
    if bias is not None:
        y = y + bias.float()
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)


def _grouped_product(
    rows: QuantizedRows,
    weight_int8: Tensor,
    col_scale: Tensor,
    activation_group: int,
    weight_group: int,
) -> Tensor:
    """Totals of groups, each times its scales, added -> fp32 [M, N]."""
    step = math.gcd(activation_group, weight_group)  # a group of 0 counts as one of any size
    num_features = weight_int8.shape[1]
    y = rows.x_int8.new_zeros(len(rows.x_int8), len(weight_int8), dtype=torch.float64)
    row_scale = rows.row_scale
    for start in range(0, num_features, step):
        part = slice(start, start + step)
        total = integer_product(rows.x_int8[:, part], rows.x_high[:, part], weight_int8[:, part])
        of_rows = row_scale[:, start // activation_group] if activation_group else row_scale
        of_cols = col_scale[:, start // weight_group] if weight_group else col_scale
        y += total * (of_rows[:, None] * of_cols)
    return y.float()


def integer_product(x_int8: Tensor, x_high: Tensor, weight_int8: Tensor) -> Tensor:
    """sum_k (x_int8 + 128 * x_high) * weight_int8 -> fp64 [M, N] of exact integers.

    An x_high without rows counts as zero.
    fp64 holds every integer up to 2**53 and one product is at most 16256 * 127, so the sum is exact
    for K below 4e9, in any order. (int32 sums of a single plane are exact for K up to 133,144.)
    """
    values = x_int8.double()
    if len(x_high):
        values = values + 128 * x_high.double()
    return values @ weight_int8.double().T


def row_absmax(x: Tensor) -> Tensor:
    """Largest magnitude of each row of x [M, K] -> [M]; 0 where K is 0."""
    return x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])


def _divide(values: Tensor, by: int) -> Tensor:
    """values / by, rounded once: on a GPU torch multiplies by the reciprocal of a Python number."""
    return values / values.new_full((), by)
