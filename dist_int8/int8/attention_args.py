"""`AttentionArgs`: what every attention of a block needs besides its tokens and its caches."""

from typing import NamedTuple

from torch import Tensor


class AttentionArgs(NamedTuple):
    """Heads, scale and positions; in the order of the compiled ops' schemas, which take them flat.

    A tuple, not a dataclass: it is made once per block and step and spread into those ops, and
    torch.compile traces through it.
    """

    num_heads: int
    """H, a multiple of num_kv_heads."""
    num_kv_heads: int
    """KV."""
    scale: float
    """Factor of q . k before the softmax."""
    cos: Tensor | None = None
    """fp32 [P, R/2], row = position: rotary embedding of the first R of D dimensions, halves paired
    ("rotate_half"; Su et al. 2021). Comes with `sin`."""
    sin: Tensor | None = None
    """fp32 [P, R/2]."""
    alibi_slopes: Tensor | None = None
    """fp32 [H]: adds slope * key position (Press et al. 2022, up to a constant per row)."""
    window: int = 0
    """Number of positions that a token sees, its own included; 0: all before it."""
