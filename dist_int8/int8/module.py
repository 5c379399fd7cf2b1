"""The base class of int8 layers."""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from dist_int8.int8 import packing

_WEIGHTS = {
    "weight_int8": packing.GROUP,
    "hot_weight": 1,
}  # what may be packed, in groups of so many


class Int8Module(nn.Module):
    """A layer whose buffers keep their dtypes, and whose weights may be packed for CPU kernels.

    Packed weights take the place of the row-major ones in `_buffers`, which the kernels read. Who
    asks for the attribute, or for the state dict, gets the row-major matrix.
    """

    def pack_(self) -> Self:
        """Packs the weights for CPU kernels, within their memory; see `packing`.

        Does nothing where they cannot be. Only for memory that is this layer's own: a tensor that
        was taken from it, or given to it, would change.
        """
        weight = self._buffers["weight_int8"]
        if weight is None or not packing.can_pack(weight):
            return self
        for name, group in _WEIGHTS.items():
            rows = self._buffers.get(name)
            if rows is not None:
                self._buffers[name] = packing.pack_(rows.contiguous(), group)
        return self

    def share_weight(self, other: "Int8Module") -> None:
        """Takes weight_int8 and col_scale of a layer without hot columns, packed or not."""
        for name in ("weight_int8", "col_scale"):
            self._buffers[name] = other._buffers[name]

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name in _WEIGHTS and isinstance(value, Tensor) and value.dim() > 2:
            return packing.unpack(value)
        return value

    def _unpack(self) -> None:
        for name in _WEIGHTS:
            weight = self._buffers.get(name)
            if weight is not None:
                self._buffers[name] = packing.row_major(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves follow `fn`; casts do not: rounding the scales would change every weight."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        weight = self._buffers["weight_int8"]
        if weight is not None and not weight.is_cpu:
            self._unpack()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _WEIGHTS:
            weight = destination.get(prefix + name)
            if weight is not None:
                destination[prefix + name] = packing.row_major(weight)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._unpack()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
