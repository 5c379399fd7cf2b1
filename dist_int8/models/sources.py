"""Where a parameter of ours comes from in a transformers checkpoint, and how it is assembled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# BLOOM and GPT-NeoX store the fused query-key-value rows head by head, and within a head query,
# key, value. Ours are all query heads, all key heads, all value heads.
RowOrder = Literal["as_stored", "interleaved_qkv"]


@dataclass(frozen=True)
class TensorSource:
    """One parameter as checkpoint tensors joined along dimension 0.

    Attributes:
        names: for each tensor its possible names, preferred first. Empty: filled with `fill`.
        shapes: for each tensor the shape it must have (for a filled parameter, its own shape).
        num_heads: heads of an interleaved fused matrix.
    """

    names: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    row_order: RowOrder = "as_stored"
    num_heads: int = 0
    fill: float = 1.0

    def assemble(self, tensors: list[Tensor]) -> Tensor:
        """Joins the tensors (in the order of `names`) into the parameter, in their own dtype."""
        if not self.names:
            return torch.full(self.shapes[0], self.fill)
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if self.row_order == "as_stored":
            return joined
        rest = joined.shape[1:]
        by_head = joined.view(self.num_heads, 3, -1, *rest)
        return by_head.transpose(0, 1).reshape(-1, *rest)


def tensor(name: str, *shape: int) -> TensorSource:
    """Describes a parameter that is stored as one tensor."""
    return TensorSource(((name,),), (shape,))


def filled(value: float, *shape: int) -> TensorSource:
    """Describes a parameter that the checkpoint does not hold."""
    return TensorSource((), (shape,), fill=value)


def linear(
    target: str,
    names: tuple[str, ...],
    rows: tuple[int, ...],
    columns: int,
    bias: bool,
    *,
    row_order: RowOrder = "as_stored",
    num_heads: int = 0,
) -> dict[str, TensorSource]:
    """Describes weight and bias of one linear of ours, made of the checkpoint's linears `names`.

    Args:
        target: our linear's name within the block.
        names: checkpoint linears, joined in this order.
        rows: output features of each.
        columns: input features.
        bias: whether they have biases.
        row_order: how the rows are stored.
        num_heads: heads of an interleaved matrix.
    """

    def source(kind: str, shape: Callable[[int], tuple[int, ...]]) -> TensorSource:
        return TensorSource(
            tuple((f"{name}.{kind}",) for name in names),
            tuple(shape(count) for count in rows),
            row_order,
            num_heads,
        )

    sources = {f"{target}.weight": source("weight", lambda count: (count, columns))}
    if bias:
        sources[f"{target}.bias"] = source("bias", lambda count: (count,))
    return sources


def norm(target: str, name: str, size: int, affine: bool = True) -> dict[str, TensorSource]:
    """Describes weight and bias of a LayerNorm; one and zero if it has none."""
    if affine:
        return {
            f"{target}.weight": tensor(f"{name}.weight", size),
            f"{target}.bias": tensor(f"{name}.bias", size),
        }
    return {f"{target}.weight": filled(1.0, size), f"{target}.bias": filled(0.0, size)}
