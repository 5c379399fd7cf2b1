"""One checkpoint tensor of a parameter of ours, and the tensors that belong to it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """One checkpoint tensor of a parameter, and the tensors that belong to it."""

    name: str
    shape: tuple[int, ...]
    """Shape of the matrix, without the padding of its layout."""
    scale: str | None = None
    """Name of the scales of an int8 matrix."""
    scale_divisor: float = 1.0
    """Divides the stored scales to give ours."""
    layout: str = "row"
    extra: tuple[str, ...] = ()
    """Other tensors, which were read already: weight_format, hot_columns."""
    hot_weight: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of every tensor of the piece."""
        others = (self.scale, *self.extra, self.hot_weight)
        return (self.name, *(name for name in others if name is not None))
