"""One checkpoint tensor of a parameter of ours, and the tensors that belong to it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """One checkpoint tensor of a parameter, and the tensors that belong to it.

    Attributes:
        shape: shape of the matrix, without the padding of its layout.
        scale: name of the scales of an int8 matrix.
        scale_divisor: divides the stored scales to give ours.
        extra: other tensors, which were read already: weight_format, hot_columns, rotation.
        hot_weight: name of the weights of its hot columns.
        rotation: requested block size of the rotation that an int8 matrix has; 0: none.
    """

    name: str
    shape: tuple[int, ...]
    scale: str | None = None
    scale_divisor: float = 1.0
    layout: str = "row"
    extra: tuple[str, ...] = ()
    hot_weight: str | None = None
    rotation: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of every tensor of the piece."""
        others = (self.scale, *self.extra, self.hot_weight)
        return (self.name, *(name for name in others if name is not None))
