"""The named points of accuracy and speed: how the int8 linears treat large elements.

`POINTS` is the one place where the defaults of rotation, outlier rule and hot columns stand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

LARGEST_ROTATION = 1024
OutlierRule = Literal["none", "absolute", "row_rms", "all"]
Accuracy = Literal["balanced", "accurate", "paper"]


def _check_rotation(rotation: int) -> int:
    if rotation != 0 and not (2 <= rotation <= LARGEST_ROTATION and rotation.bit_count() == 1):
        raise ValueError(
            f"must be 0 or a power of two from 2 to {LARGEST_ROTATION}, got {rotation}; 64 is a "
            "good size, 0 turns the rotation off"
        )
    return rotation


Rotation = Annotated[int, AfterValidator(_check_rotation)]


@dataclass(frozen=True)
class Numerics:
    """How the int8 linears treat large elements of x.

    Attributes:
        rotation: requested block size of the rotation; 0: none.
        outlier_rule: which elements of x are dynamic outliers.
        outlier_threshold: threshold of that rule; 0.0 for a rule without one.
        num_hot_columns: number that calibration finds per linear; `down_hot_columns` in `down`.
    """

    rotation: int
    outlier_rule: OutlierRule
    outlier_threshold: float
    num_hot_columns: int

    @property
    def down_hot_columns(self) -> int:
        """Number in `down`, the second linear of an MLP, or all its features if it has fewer."""
        return DOWN_FACTOR * self.num_hot_columns


@dataclass(frozen=True)
class Point:
    """A named point.

    Attributes:
        rotation: as of `Numerics`.
        rule: outlier rule where the weights are rotated.
        unrotated_rule: outlier rule where they are not, as in an int8 checkpoint of bitsandbytes:
            int8 weights cannot be rotated without a second rounding.
        num_hot_columns: as of `Numerics`.
    """

    rotation: int
    rule: OutlierRule
    unrotated_rule: OutlierRule
    num_hot_columns: int


DEFAULT_POINT: Accuracy = "balanced"
POINTS: Mapping[str, Point] = {
    "balanced": Point(64, "none", "row_rms", 16),
    "accurate": Point(64, "all", "all", 16),
    "paper": Point(0, "absolute", "absolute", 0),
}
# Half of the KL divergence that int8 costs is of `down`, whose inputs are products.
DOWN_FACTOR = 4
THRESHOLDS: Mapping[str, float] = {"absolute": 6.0, "row_rms": 4.0}  # of the rules that have one


@dataclass(frozen=True)
class Chosen:
    """What the settings say; None: what the point says."""

    accuracy: str | None = None
    rotation: int | None = None
    outlier_rule: OutlierRule | None = None
    outlier_threshold: float | None = None
    num_hot_columns: int | None = None

    def resolve(self, stored_rotation: int | None = None) -> Numerics:
        """Resolves the point and what was chosen beside it.

        Args:
            stored_rotation: of the weights of an int8 checkpoint, which has decided; None: the
                weights are floating-point.

        Raises:
            ValueError: no such point, a threshold without a rule that has one, or the rule absolute
                with rotated weights.
        """
        name = self.accuracy or DEFAULT_POINT
        if name not in POINTS:
            raise ValueError(
                f"accuracy: accuracy must be one of {', '.join(POINTS)}, got {name!r}; choose one"
            )
        point = POINTS[name]
        rotation = point.rotation if self.rotation is None else self.rotation
        rotation = rotation if stored_rotation is None else stored_rotation
        rule = self.outlier_rule or (point.rule if rotation else point.unrotated_rule)
        threshold, num_hot = self.outlier_threshold, self.num_hot_columns
        if rule == "absolute" and rotation:
            raise ValueError(
                f"outlier_rule: outlier_rule absolute must have weights that are not rotated, got "
                f"rotation {rotation}, which scales x; write rotation: 0 beside it, or quantize "
                "with accuracy: paper"
            )
        # 0 beside a rule without one is what this resolves to; beside "none" it says the same
        is_free = rule == "none" or self.outlier_rule is not None
        if threshold is not None and rule not in THRESHOLDS and not (threshold == 0 and is_free):
            raise ValueError(
                f"outlier_threshold: outlier_threshold must be left out where the rule has none "
                f"({name} with rotation {rotation}: {rule}), got {threshold:g}; write "
                "outlier_rule: row_rms or absolute beside it"
            )
        return Numerics(
            rotation,
            rule,
            THRESHOLDS.get(rule, 0.0) if threshold is None else threshold,
            point.num_hot_columns if num_hot is None else num_hot,
        )


def describe_numerics(name: str | None, numerics: Numerics, num_hot: int, num_in_down: int) -> str:
    """Describes in a few words what holds, for a plan.

    Args:
        name: of the point; None: the default.
        numerics: what holds.
        num_hot: number of hot columns that the linears have.
        num_in_down: number that `down` has.
    """
    rotated = f"rotated in blocks of {numerics.rotation}" if numerics.rotation else "not rotated"
    rule = numerics.outlier_rule
    outliers = f"outliers {rule}"
    if rule in THRESHOLDS:
        outliers += f" {numerics.outlier_threshold:g}"
    hot = f"{num_hot or 'no'} hot columns"
    hot += f", {num_in_down} in down" if num_in_down != num_hot else ""
    return f"int8 linears: {name or DEFAULT_POINT} ({rotated}, {outliers}, {hot})"
