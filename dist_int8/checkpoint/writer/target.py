"""What a checkpoint is rewritten to: the form, and which parameters are int8 in it."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal

from dist_int8.checkpoint.calibrate import Calibration

TargetFormat = Literal["dist_int8", "bitsandbytes", "floating"]


@dataclass(frozen=True)
class Target:
    """The form of a rewritten checkpoint; parameters go by our names ("blocks.0.qkv.weight").

    Attributes:
        quantized: parameters that are int8 in it.
        hot_columns: input features that quantized parameters keep exactly.
        calibration: finds hot columns instead, when the job runs.
        dtype: dtype of all floating parameters ("float16"); None: as stored.
    """

    form: TargetFormat
    quantized: AbstractSet[str] = frozenset()
    hot_columns: Mapping[str, Sequence[int]] = field(default_factory=dict)
    calibration: Calibration | None = None
    dtype: str | None = None

    def is_calibrated(self, parameter: str) -> bool:
        """Whether calibration finds the hot columns of a parameter."""
        return (
            self.calibration is not None
            and parameter in self.quantized
            and parameter.startswith(("blocks.", "lm_head."))
        )

    def has_own_columns(self, parameter: str) -> bool:
        """Whether a parameter gets hot columns that its source does not have."""
        chosen = parameter in self.hot_columns or self.calibration is not None
        return chosen and parameter in self.quantized
