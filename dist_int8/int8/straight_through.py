"""The gradient of `int8_linear`: straight through the rounding of x (Bengio et al. 2013).

That of a linear layer with the dequantized weight W [N, K], which is constant: dL/dx = dL/dy @ W in
x's dtype, and the sum of dL/dy over the rows for the bias. Adapters beside, above and below an int8
layer train as with bitsandbytes' `Linear8bitLt`. Nothing is saved but the int8 weight itself; the
backward pass makes W for as long as its product takes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dist_int8.int8 import packing, reference


def is_recorded(*inputs: Tensor | None) -> bool:
    """Whether autograd records a call with these inputs, in reverse or forward mode."""
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return True  # inside a dual level; that an input has a tangent does not show
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def dequantize(
    weight_int8: Tensor,
    col_scale: Tensor,
    hot_columns: Tensor | None,
    hot_weight: Tensor | None,
    rotation: int,
    dtype: torch.dtype,
) -> Tensor:
    """The floating weight [N, K] of an int8 layer, rotated back; hot columns as they are kept."""
    rows = packing.row_major(weight_int8)
    weight = reference.dequantize_weight(rows, col_scale, dtype, rotation=rotation)
    if hot_columns is not None and hot_weight is not None:
        at = hot_columns.to(weight.device).long()  # of a layer on meta they are on the CPU
        weight[:, at] = packing.row_major(hot_weight).to(dtype)
    return weight


def _weight_of(ctx: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
    weight_int8, col_scale, hot_columns, hot_weight = ctx.saved_tensors
    return weight_int8, col_scale, hot_columns, hot_weight, ctx.rotation


class StraightThrough(torch.autograd.Function):
    """`product(x, weight_int8, col_scale, bias, hot_columns, hot_weight, rotation, *rule)`.


    Its gradient is that of a linear layer with the floating weight. The weight does not train:
    col_scale or hot_weight that requires grad is a RuntimeError.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(product: Callable[..., Tensor], *inputs: Any) -> Tensor:
        return product(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, weight_int8, col_scale, bias, hot_columns, hot_weight, rotation, *_ = inputs
        for name, tensor in (("col_scale", col_scale), ("hot_weight", hot_weight)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"int8_linear has no gradient of {name}, but it requires grad. The weight of "
                    "an int8 layer does not train: keep the layer in floating point, or train an "
                    "adapter beside it"
                )
        ctx.save_for_backward(weight_int8, col_scale, hot_columns, hot_weight)
        ctx.x_dtype = x.dtype
        ctx.rotation = rotation
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        _, wants_x, _, _, wants_bias, *rest = ctx.needs_input_grad
        grad_x = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if wants_x:
                weight = dequantize(*_weight_of(ctx), ctx.x_dtype)
                grad_x = grad @ weight
            if wants_bias:
                grad_bias = grad.float().sum(0).to(ctx.bias_dtype)
        return None, grad_x, None, None, grad_bias, *(None for _ in rest)
