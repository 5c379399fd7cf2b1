"""The base class of int8 layers."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class Int8Module(nn.Module):
    """A layer whose buffers keep their dtypes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves follow `fn`; casts do not: rounding the scales would change every weight."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self
