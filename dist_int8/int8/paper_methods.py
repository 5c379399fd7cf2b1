"""The methods that the LLM.int8() paper compares (Dettmers et al. 2022, arXiv:2208.07339).

In plain torch, as specifications. x [M, K] and weight [N, K] floating -> y [M, N] in x's dtype.
"""

import torch
from torch import Tensor

from dist_int8.int8.reference import (
    PLANE_MAX,
    check_matrix,
    dequantize_weight,
    int8_linear,
    outlier_mask,
    quantize_weight,
    refuse_gradients,
    row_absmax,
)


def absmax_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Absmax quantization (section 2.1): one scale for all of x, one for all of weight."""
    refuse_gradients("absmax_linear", x)
    x_float, weight_float = x.float(), weight.float()
    return _scaled_linear(
        x, x_float.abs().amax() / PLANE_MAX, weight_float, weight_float.abs().amax() / PLANE_MAX
    )


def row_wise_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Row-wise quantization (Table 1): one scale per row of x, one for all of weight."""
    refuse_gradients("row_wise_linear", x)
    weight_float = weight.float()
    return _scaled_linear(
        x,
        row_absmax(x.float())[:, None] / PLANE_MAX,
        weight_float,
        weight_float.abs().amax() / PLANE_MAX,
    )


def vector_wise_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Vector-wise quantization (section 3.1), naive W8A8: a scale for each row of x and weight."""
    weight_int8, col_scale = quantize_weight(weight)
    return int8_linear(x, weight_int8, col_scale, outlier_rule="none", outlier_threshold=0.0)


def zeropoint_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Zero-point quantization (section 2.1): one scale and one offset for x, the same for weight.

    max - min is spread over 254 steps; the offsets are added back before the product, which is
    algebraically the paper's product of shifted integers.
    """
    refuse_gradients("zeropoint_linear", x)
    return (_zeropoint_round(x.float()).double() @ _zeropoint_round(weight.float()).double().T).to(
        x.dtype
    )


def llm_int8_linear(
    x: Tensor, weight: Tensor, threshold: float = 6.0, union_of_columns: bool = False
) -> Tensor:
    """LLM.int8() (section 3.2): outliers |x| >= threshold in floating point, the rest in int8.

    union_of_columns False: each row has its own outliers, multiplied by the original weights.
    union_of_columns True: what bitsandbytes computes. A feature with an outlier in any row goes to
    floating point for every row, so a result depends on its neighbours; its other elements still
    count in their rows' scales; and its weights are the dequantized int8 ones.
    """
    check_matrix("llm_int8_linear", "x", x)
    refuse_gradients("llm_int8_linear", x)
    weight_int8, col_scale = quantize_weight(weight)
    values = x.float()
    outliers = outlier_mask(values, "absolute", threshold)
    scale = row_absmax(values.masked_fill(outliers, 0.0))[:, None] / PLANE_MAX
    kept_out = outliers.any(dim=0).expand_as(outliers) if union_of_columns else outliers
    q = torch.where(scale > 0, values.masked_fill(kept_out, 0.0) / scale, 0.0).round()
    outlier_weight = (
        dequantize_weight(weight_int8, col_scale) if union_of_columns else weight.float()
    )
    y = (q.double() @ weight_int8.double().T).float() * (scale * col_scale)
    return (y + values.masked_fill(~kept_out, 0.0) @ outlier_weight.T).to(x.dtype)


def _scaled_linear(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """round(x / x_scale) @ round(weight / weight_scale).T times both scales, or zeros."""
    x_q = torch.where(x_scale > 0, x.float() / x_scale, 0.0).round()
    weight_q = torch.where(weight_scale > 0, weight / weight_scale, 0.0).round()
    return ((x_q.double() @ weight_q.double().T).float() * (x_scale * weight_scale)).to(x.dtype)


def _zeropoint_round(x: Tensor) -> Tensor:
    """x rounded to the 255 levels between its smallest and largest element (dequantized, fp32)."""
    low, high = torch.aminmax(x)
    step = (high - low) / (2 * PLANE_MAX)
    if step == 0:
        return x
    zero_point = (low / step).round() + PLANE_MAX
    q = ((x / step).round() - zero_point).clamp(-PLANE_MAX, PLANE_MAX)
    return (q + zero_point) * step
