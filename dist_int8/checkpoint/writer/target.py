"""What a checkpoint is rewritten to: the form, and which parameters are int8 in it."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal

from dist_int8.checkpoint.calibrate import Calibration
from dist_int8.checkpoint.tied_head import EMBEDDING

TargetFormat = Literal["dist_int8", "bitsandbytes", "floating"]


@dataclass(frozen=True)
class Target:
    """The form of a rewritten checkpoint; parameters go by our names ("blocks.0.qkv.weight").

    Attributes:
        quantized: parameters that are int8 in it.
        hot_columns: input features that quantized parameters keep exactly.
        calibration: finds hot columns instead, when the job runs.
        rotation: requested size of the rotation of the linears that are quantized.
        accuracy: named point that the checkpoint is made for; None: the default.
        dtype: dtype of all floating parameters ("float16"); None: as stored.
    """

    form: TargetFormat
    quantized: AbstractSet[str] = frozenset()
    hot_columns: Mapping[str, Sequence[int]] = field(default_factory=dict)
    calibration: Calibration | None = None
    rotation: int = 0
    accuracy: str | None = None
    dtype: str | None = None

    def is_calibrated(self, parameter: str) -> bool:
        """Whether calibration finds the hot columns of a parameter."""
        return (
            self.calibration is not None
            and parameter in self.quantized
            and parameter.startswith(("blocks.", "lm_head."))
        )

    def find_rotation(self, parameter: str) -> int:
        """Returns the rotation that a parameter gets; rows of the embedding are looked up."""
        return self.rotation if parameter in self.quantized and parameter != EMBEDDING else 0

    def changes(self, parameter: str) -> bool:
        """Whether a parameter gets hot columns or a rotation that its source does not have."""
        has_columns = parameter in self.hot_columns or self.calibration is not None
        return parameter in self.quantized and (has_columns or self.rotation > 0)
