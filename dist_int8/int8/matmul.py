"""Matrix products with int8 weights, and a floating one: compiled, else plain torch."""

import torch
from torch import Tensor

from dist_int8.int8 import packing, plain, reference
from dist_int8.int8.library import load
from dist_int8.int8.reference import QuantizedRows
from dist_int8.int8.registry import has_kernel, has_op
from dist_int8.int8.rows import rule_index
from dist_int8.int8.straight_through import StraightThrough, is_recorded

_COMPILED = load()
# The compiled ops, resolved once; None where the library does not have them.
_ops = torch.ops.dist_int8
_int8_linear = _ops.int8_linear.default if _COMPILED else None
_linear = _ops.linear.default if _COMPILED else None
_int8_matmul = _ops.int8_matmul.default if has_op("int8_matmul") else None
_int8_weight_linear = _ops.int8_weight_linear.default if has_op("int8_weight_linear") else None
_MATMUL_ON_CUDA = has_kernel("int8_matmul", "CUDA")


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
) -> Tensor:
    """x [..., K] (fp32, bf16, fp16), weight_int8 [N, K], col_scale fp32 [N] -> [..., N] like x.

    bias [N]; hot_columns int32 [H] with hot_weight [N, H], floating; `rotation` as of the weight.
    On CPUs weight_int8 and hot_weight may be packed (`packing`), with the same result.
    The sum over k is an exact integer; see `reference.int8_linear`. On CPU equal to it bit for bit
    without hot columns, whose products are summed in fp32; on a GPU see `int8_matmul`. Raises
    ValueError for shapes, dtypes, rules, rotations, and K > 131072.

    The gradient of x and of the bias is that of a linear layer with the dequantized weight; see
    `straight_through`. Raises RuntimeError where another input requires grad.
    """
    if x.dim() != 2:
        rows = int8_linear(
            x.reshape(-1, x.shape[-1]),
            weight_int8,
            col_scale,
            bias,
            outlier_rule=outlier_rule,
            outlier_threshold=outlier_threshold,
            hot_columns=hot_columns,
            hot_weight=hot_weight,
            rotation=rotation,
        )
        return rows.reshape(*x.shape[:-1], rows.shape[-1])
    inputs = (x, weight_int8, col_scale, bias, hot_columns, hot_weight)
    if is_recorded(x, col_scale, bias, hot_weight):
        return StraightThrough.apply(_product, *inputs, rotation, outlier_rule, outlier_threshold)
    return _product(*inputs, rotation, outlier_rule, outlier_threshold)


def _product(
    x: Tensor,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None,
    hot_columns: Tensor | None,
    hot_weight: Tensor | None,
    rotation: int,
    outlier_rule: str,
    outlier_threshold: float,
) -> Tensor:
    """`int8_linear` of a matrix x, outside autograd."""
    if _int8_linear is not None and _has_kernels(x):
        rule = rule_index(outlier_rule, outlier_threshold)
        inputs = (x.contiguous(), weight_int8, col_scale, bias, rule, outlier_threshold)
        if torch.compiler.is_compiling():
            return _int8_linear(*inputs, hot_columns, hot_weight, rotation)
        with torch._C._AutoDispatchBelowAutograd():  # spares no_grad() the kernel that refuses
            return _int8_linear(*inputs, hot_columns, hot_weight, rotation)
    if hot_weight is not None:
        hot_weight = packing.row_major(hot_weight)
    return reference.int8_linear(
        x,
        packing.row_major(weight_int8),
        col_scale,
        bias,
        outlier_rule=outlier_rule,
        outlier_threshold=outlier_threshold,
        hot_columns=hot_columns,
        hot_weight=hot_weight,
        rotation=rotation,
    )


def int8_matmul(
    rows: QuantizedRows,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None = None,
    *,
    hot_weight: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`int8_linear` of rows that are quantized already: rows of M, weight_int8 [N, K] -> [M, N].

    The result and residual [M, N] (added last, in fp32) have the dtype of rows.x_hot; hot_weight
    [N, H] belongs to its columns. See `reference.int8_matmul`, which this equals on CPU as
    `int8_linear` does. On a GPU the kernels for few rows equal it likewise; where a row count picks
    a CUTLASS kernel (gemm_tiles.h in csrc), outliers, hot columns, bias and residual are rounded
    to the result's dtype once before they meet the product of x_int8, as a layer in 16 bits rounds
    before its residual is added. Raises ValueError for shapes, dtypes, and K > 131072.
    """
    if _int8_matmul is not None and _has_kernels(rows.x_int8):
        return _int8_matmul(*rows, weight_int8, col_scale, bias, hot_weight, residual)
    if hot_weight is not None:
        hot_weight = packing.row_major(hot_weight)
    weight_int8 = packing.row_major(weight_int8)
    return reference.int8_matmul(
        rows, weight_int8, col_scale, bias, hot_weight=hot_weight, residual=residual
    )


def int8_weight_linear(
    x: Tensor,
    weight_int8: Tensor,
    col_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [M, K], weight_int8 [N, K], col_scale fp32 [N] -> [M, N] in x's dtype; x is not quantized.

    bias [N], residual [M, N] in x's dtype. Most exact, and on a GPU no slower than `int8_linear`
    where reading the weights is what takes time; meant for M up to 32 and bf16 or fp16 there. See
    `reference.int8_weight_linear`; it runs where no kernel is compiled, on CPUs always. Raises
    ValueError for shapes and dtypes.
    """
    if _int8_weight_linear is not None and _has_kernels(x):
        return _int8_weight_linear(x.contiguous(), weight_int8, col_scale, bias, residual)
    return reference.int8_weight_linear(x, weight_int8, col_scale, bias, residual)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] or None -> [..., N] in x's dtype, summed in fp32.

    Each of them is fp32, bf16 or fp16; weight may be narrower than x and is widened without loss as
    it is read (a head in its checkpoint's dtype is half the bytes). Raises ValueError for shapes
    and dtypes.
    """
    if x.dim() != 2:
        rows = linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return rows.reshape(*x.shape[:-1], weight.shape[0])
    if _linear is not None and x.is_cpu:
        return _linear(x.contiguous(), weight, bias)
    return plain.linear(x, weight, bias)


def _has_kernels(x: Tensor) -> bool:
    """Whether the int8 products are compiled for the device of x (given a library)."""
    return x.is_cpu or (_MATMUL_ON_CUDA and x.is_cuda)


if _int8_weight_linear is not None:
    # No compiled kernel: quantizing rows costs a CPU less than widening weights.
    torch.library.impl("dist_int8::int8_weight_linear", "CPU")(reference.int8_weight_linear)
