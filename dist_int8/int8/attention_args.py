"""`AttentionArgs`: what every attention of a block needs besides its tokens and its caches."""

from typing import NamedTuple

from torch import Tensor


class AttentionArgs(NamedTuple):
    """Heads, scale and positions; in the order of the compiled ops' schemas, which take them flat.

    A tuple, not a dataclass: it is made once per block and step and spread into those ops, and
    torch.compile traces through it.

    Attributes:
        num_heads: H, a multiple of num_kv_heads.
        num_kv_heads: KV.
        scale: factor of q . k before the softmax.
        cos: fp32 [P, R/2], row = position: rotary embedding of the first R of D dimensions, halves
            paired ("rotate_half"; Su et al. 2021). Comes with `sin`.
        sin: fp32 [P, R/2].
        alibi_slopes: fp32 [H]: adds slope * key position (Press et al. 2022, up to a constant per
            row).
        window: number of positions that a token sees, its own included; 0: all before it.
    """

    num_heads: int
    num_kv_heads: int
    scale: float
    cos: Tensor | None = None
    sin: Tensor | None = None
    alibi_slopes: Tensor | None = None
    window: int = 0
