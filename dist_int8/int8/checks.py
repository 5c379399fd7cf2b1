"""What the ops refuse, in one voice: rules, shapes, dtypes and gradients."""

import math

import torch
from torch import Tensor

OUTLIER_RULES = ("none", "absolute", "row_rms", "all")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_outlier_rule(outlier_rule: str, outlier_threshold: float) -> str:
    """The rule that holds: `outlier_rule`, or "none" where a threshold of 0 turns it off.

    (That meaning of 0 is bitsandbytes' convention.)

    Raises ValueError for an unknown rule, and for a threshold that is negative, infinite or NaN.
    """
    if outlier_rule not in OUTLIER_RULES:
        raise ValueError(
            f"int8: outlier_rule must be one of {', '.join(OUTLIER_RULES)}, got {outlier_rule!r}; "
            "choose one of them"
        )
    if not (math.isfinite(outlier_threshold) and outlier_threshold >= 0):
        raise ValueError(
            f"int8: outlier_threshold must be a finite number >= 0, got {outlier_threshold}; "
            "0 turns the decomposition off"
        )
    if outlier_threshold == 0 and outlier_rule in ("absolute", "row_rms"):
        return "none"
    return outlier_rule


def refuse_gradients(op: str, *inputs: Tensor | None) -> None:
    """Raises RuntimeError where autograd would record `op`: rounding would cut the graph."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise RuntimeError(
            f"{op} has no gradient, but one of its inputs requires grad. Call it inside "
            "torch.no_grad() or torch.inference_mode(), or detach the input; train through "
            "dist_int8.Int8Linear, which passes the gradient of x on, or keep the layer in "
            "floating point"
        )


def check_matrix(op: str, argument: str, value: Tensor) -> None:
    """Raises ValueError unless `value` is a floating matrix."""
    if value.dim() != 2:
        raise ValueError(
            f"{op}: {argument} must be a matrix, got shape {list(value.shape)}; "
            "flatten the leading dimensions first"
        )
    if value.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{op}: {argument} must be float32, bfloat16 or float16, got {value.dtype}; "
            "convert it with .to(torch.float32)"
        )


def check_weight(op: str, weight_int8: Tensor, num_features: int) -> None:
    if (
        weight_int8.dim() != 2
        or weight_int8.dtype != torch.int8
        or weight_int8.shape[1] != num_features
    ):
        raise ValueError(
            f"{op}: weight_int8 must be int8 [N, K={num_features}], "
            f"got {weight_int8.dtype} {list(weight_int8.shape)}; make it with quantize_weight"
        )
