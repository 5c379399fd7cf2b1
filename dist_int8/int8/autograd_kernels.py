"""What autograd is told of the compiled ops: that they have no gradient.

Imported by `library.load()` once the library is there. torch takes an op without an autograd kernel
for one whose gradient is None, and warns when it is too late. In inference mode, where the runtime
works, these kernels are not reached. (`ops.int8_linear` has a gradient: `straight_through`.)
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dist_int8.int8.checks import refuse_gradients
from dist_int8.int8.registry import OPS, has_op


def _iter_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _iter_tensors(value)


def _refusing(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.dist_int8, name).default

    def refuse_or_run(keyset: torch.DispatchKeySet, *args: Any) -> Any:
        refuse_gradients(name, *_iter_tensors(args))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return refuse_or_run


_library = torch.library.Library("dist_int8", "IMPL")
for _name in filter(has_op, OPS):
    _library.impl(_name, _refusing(_name), "Autograd", with_keyset=True)
