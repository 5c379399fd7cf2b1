"""Which part of a model a pipeline stage holds."""

from dataclasses import dataclass
from typing import Self

from dist_int8.models.spec import ModelSpec


@dataclass(frozen=True)
class StageSlice:
    """A contiguous run of a model's blocks, with what stands before and after it at the ends.

    Attributes:
        blocks: block numbers in the whole model, for example range(0, 15); may be empty.
        first: whether it holds the embedding.
        last: whether it holds the final norm and the head.
    """

    blocks: range
    first: bool
    last: bool

    @classmethod
    def whole(cls, spec: ModelSpec) -> Self:
        """The slice of a stage that holds the whole model."""
        return cls(range(spec.num_blocks), first=True, last=True)
