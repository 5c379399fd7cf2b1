"""What has no gradient refuses an input that requires one, instead of cutting the graph."""

import torch
from torch import Tensor


def refuse_gradients(op: str, *inputs: object) -> None:
    """Raises RuntimeError where autograd would record `op` for one of its inputs."""
    if torch.is_grad_enabled() and any(map(_requires_grad, inputs)):
        raise RuntimeError(
            f"{op} has no gradient, but one of its inputs requires grad. Call it inside "
            "torch.no_grad() or torch.inference_mode(), or detach the input; train through "
            "dist_int8.Int8Linear, which passes the gradient of x on, or keep the layer in "
            "floating point"
        )


def _requires_grad(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, list | tuple) and any(map(_requires_grad, value))
