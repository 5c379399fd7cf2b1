"""`Int8Weight`: the weight of an int8 layer as code that was written for `nn.Linear` reads it."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dist_int8.int8 import straight_through

# Answered by the dequantized weight: they look at the memory of a tensor, and this one has none.
_OF_MEMORY = {
    Tensor.__array__,
    Tensor.__deepcopy__,
    Tensor.__dlpack__,
    Tensor.__reduce_ex__,
    Tensor.__repr__,
    Tensor.data_ptr,
    Tensor.is_pinned,
    Tensor.is_shared,
    Tensor.numpy,
    Tensor.pin_memory,
    Tensor.share_memory_,
    Tensor.storage,
    Tensor.tolist,
    Tensor.untyped_storage,
}
_WRITES = {Tensor.__setitem__}
_WRITES |= {getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad")}


class Int8Weight(Tensor):
    """A floating matrix [N, K] without memory of its own, dequantized wherever a value is needed.

    Shape, dtype, device and the like cost nothing. Every operation first makes the floating weight,
    and gives plain tensors, views included. It can be neither changed nor trained: RuntimeError.
    """

    _parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]

    @classmethod
    def of(
        cls,
        weight_int8: Tensor,
        col_scale: Tensor,
        hot_columns: Tensor | None,
        hot_weight: Tensor | None,
        rotation: int,
        dtype: torch.dtype,
    ) -> Self:
        """The view of weight_int8 [N, K] and col_scale [N]; of hot columns [H] and [N, H]."""
        self: Self = Tensor._make_wrapper_subclass(
            cls, weight_int8.shape, dtype=dtype, device=weight_int8.device
        )
        self._parts = weight_int8, col_scale, hot_columns, hot_weight, rotation
        return self

    def _floating(self) -> Tensor:
        return straight_through.dequantize(*self._parts, dtype=self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        trains = func is Tensor.requires_grad_ and (args[1:] or (True,))[0]
        if func in _WRITES or (trains and kwargs.get("requires_grad", True)):
            raise _read_only()
        if func in _OF_MEMORY:
            args, kwargs = _without_views((args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if argument.is_write and isinstance(value, Int8Weight):
                raise _read_only()
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            view: Int8Weight = args[0]  # `.data` asks for it, and code likes to write to that
            return cls.of(*view._parts, dtype=view.dtype)
        args, kwargs = _without_views((args, kwargs))
        return func(*args, **kwargs)


def _without_views(arguments: Any) -> Any:
    return tree_map_only(Int8Weight, Int8Weight._floating, arguments)


def _read_only() -> RuntimeError:
    return RuntimeError(
        "The weight of an Int8Linear is in int8: it cannot be changed in place and does not train. "
        "Fill the layer with quantize_(weight, bias), or keep it in floating point"
    )
