"""The ops without a gradient refuse an input that requires one, instead of cutting the graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_int8.int8.registry import OPS, has_op


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


def _refusing(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.dist_int8, name).default

    def refuse_or_run(keyset: torch.DispatchKeySet, *args: Any) -> Any:
        refuse_gradients(name, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return refuse_or_run


# torch takes a compiled op without an autograd kernel for one whose gradient is None, and warns
# when it is too late. In inference mode these kernels are not reached.
_library = torch.library.Library("dist_int8", "IMPL")
for _name in filter(has_op, OPS):
    _library.impl(_name, _refusing(_name), "Autograd", with_keyset=True)
