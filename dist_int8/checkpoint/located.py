"""A parameter of ours and the checkpoint tensors that it is made from."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dist_int8.checkpoint.piece import Piece
from dist_int8.models.sources import TensorSource


@dataclass(frozen=True)
class Located:
    """A parameter of ours: its source, and the pieces it was resolved to.

    Attributes:
        hot_columns: int32 [H], the same for all pieces.
    """

    source: TensorSource
    pieces: tuple[Piece, ...]
    hot_columns: Tensor | None = field(default=None, compare=False)

    @property
    def is_int8(self) -> bool:
        """Whether it is stored in int8, all of it."""
        return bool(self.pieces) and all(piece.scale is not None for piece in self.pieces)

    @property
    def rotation(self) -> int:
        """Requested size of the rotation of what is stored in int8, all of it; 0: none."""
        return self.pieces[0].rotation if self.is_int8 else 0

    @property
    def is_mixed(self) -> bool:
        """Whether some of its pieces are int8 and others not; it is held in floating point."""
        return not self.is_int8 and any(piece.scale is not None for piece in self.pieces)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of every tensor it is made from."""
        return tuple(name for piece in self.pieces for name in piece.names)

    @cached_property
    def order(self) -> Tensor | None:
        """int64 [N]: the row of the parameter for each stored row; None: as stored."""
        if self.source.row_order == "as_stored":
            return None
        counts = [piece.shape[0] for piece in self.pieces]
        rows = torch.arange(sum(counts))
        stored = self.source.assemble(list(rows.split(counts)))
        order = torch.empty_like(rows)
        order[stored] = rows
        return order
