"""Points of the accuracy frontier, and a linear of transformers' model computed at one of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_int8.int8 import reference
from dist_int8.int8.rotation import rotate_weight, rotation_block

TILE_ROWS, TILE_COLUMNS = 128, 64  # of x: what a kernel looks at to leave a second plane out
INT8_STEP, FLOAT_STEP = 32, 16  # K of one tensor-core step, which take the same time
HOT_STEP = 16  # hot columns come in steps of the tensor cores
LARGEST = 1024  # the largest rotation there is


@dataclass(frozen=True)
class Point:
    """One numerics of the linears.

    Attributes:
        rotation: requested block size; 0: none.
        hot: hot columns of a linear, a number, or "K/64" for a share of its input features,
            rounded to a multiple of 16 and at least 16.
        hot_down: the same for the second linear of an MLP; None: as `hot`.
        choose: "absmax" or "energy", the statistic whose largest features are the hot ones.
        rule: outlier rule.
        threshold: of the rule.
        activation_group: input features per scale of x; 0: one scale per row.
        weight_group: input features per scale of the weight; 0: one scale per output feature.
        int8_head: head with the same numerics.
        int8_embedding: embedding with one scale per token.
        int8_kv: keys and values in int8, one scale per token and head; keys and queries rotated
            by `rotation` first.
    """

    rotation: int = 0
    hot: int | str = 16
    hot_down: int | str | None = None
    choose: str = "energy"
    rule: str = "none"
    threshold: float = 0.0
    activation_group: int = 0
    weight_group: int = 0
    int8_head: bool = False
    int8_embedding: bool = False
    int8_kv: bool = False

    def num_hot(self, num_features: int, is_down: bool = False) -> int:
        """Number of hot columns of a linear of K input features."""
        hot = self.hot_down if is_down and self.hot_down is not None else self.hot
        if isinstance(hot, str):
            share = num_features / int(hot.removeprefix("K/"))
            hot = max(HOT_STEP, HOT_STEP * round(share / HOT_STEP))
        return min(hot, num_features)

    @property
    def name(self) -> str:
        """What differs from one plane without rotation and 16 hot columns."""
        parts = [f"rotated {self.rotation}" if self.rotation else "not rotated", f"{self.hot} hot"]
        if self.hot_down is not None:
            parts[-1] += f", {self.hot_down} in down"
        if self.choose != "energy":
            parts.append(f"by {self.choose}")
        if self.rule != "none":
            parts.append(f"{self.rule} {self.threshold:g}" if self.threshold else self.rule)
        for group, what in ((self.activation_group, "x"), (self.weight_group, "W")):
            if group:
                parts.append(f"{what} per {group}")
        extras = (("int8_head", "head"), ("int8_embedding", "embedding"), ("int8_kv", "KV"))
        return ", ".join([*parts, *(title for name, title in extras if getattr(self, name))])


@dataclass
class Features:
    """What calibration saw of the inputs of a linear: of each feature, fp32 [K]."""

    absmax: Tensor
    square_sum: Tensor

    def hottest(self, choose: str, num: int) -> Tensor:
        """The `num` features to keep exact, ascending."""
        score = self.absmax if choose == "absmax" else self.square_sum
        return score.topk(num).indices.sort().values


@dataclass
class Cost:
    """What a point costs, added over linears.

    Attributes:
        num_bytes: of the linears' weights, scales, and hot columns in 16 bits.
        plain_bytes: the same without hot columns and with one scale per output feature.
        steps: tensor-core steps per tile of outputs, weighted by the linear's output features.
        plain_steps: those of one int8 plane without hot columns.
        conversions: scaled sums added per output, weighted likewise (1 without groups).
        num_outputs: output features.
        flagged, num_tiles: tiles of x with an outlier, and all.
    """

    num_bytes: int = 0
    plain_bytes: int = 0
    steps: float = 0.0
    plain_steps: float = 0.0
    conversions: int = 0
    num_outputs: int = 0
    flagged: int = 0
    num_tiles: int = 0

    def figures(self) -> dict[str, float]:
        """Relative to one int8 plane with one scale per row and per output feature."""
        return {
            "MiB": self.num_bytes / 2**20,
            "bytes": self.num_bytes / self.plain_bytes,
            "work": self.steps / self.plain_steps,
            "sums": self.conversions / self.num_outputs,
        }


@dataclass
class PointLinear:
    """A linear computed at a point, as `reference.int8_linear`, with fp32 sums (faster)."""

    linear: nn.Linear
    point: Point
    features: Features
    is_down: bool
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        weight = self.linear.weight.detach().float()
        num = self.point.num_hot(weight.shape[1], self.is_down)
        self.hot_columns = self.features.hottest(self.point.choose, num)
        self.hot_weight = weight[:, self.hot_columns]
        cold = weight.index_fill(1, self.hot_columns, 0.0)
        cold = rotate_weight(cold, self.point.rotation)
        group = self.point.weight_group
        self.weight_int8, self.col_scale = reference.quantize_weight(cold, group)
        scale = reference.spread(self.col_scale, weight.shape[1], group)
        self.rounded = self.weight_int8.float() * scale
        self._count()

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        y = nn.functional.linear(self._round(rows), self.rounded, self.linear.bias)
        if len(self.hot_columns):
            y += rows[:, self.hot_columns] @ self.hot_weight.T
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _round(self, x: Tensor) -> Tensor:
        """What the integers of x [M, K] stand for: row_scale * (x_int8 + 128 * x_high)."""
        point = self.point
        rows = reference.quantize_rows(
            x,
            point.rule,
            point.threshold,
            self.hot_columns,
            point.rotation,
            point.activation_group,
        )
        scale = reference.spread(rows.row_scale, x.shape[1], point.activation_group)
        if point.rule == "none":
            return rows.x_int8.float() * scale
        self._count_tiles(rows.x_high)
        return (rows.x_int8.float() + 128 * rows.x_high.float()) * scale

    def _count(self) -> None:
        num_outputs, num_features = self.weight_int8.shape
        num_hot, cost = len(self.hot_columns), self.cost
        cost.plain_bytes = num_outputs * (num_features + 4)
        cost.num_bytes = self.weight_int8.numel() + 4 * self.col_scale.numel()
        cost.num_bytes += num_hot * (2 * num_outputs + 4)
        cost.plain_steps = num_outputs * math.ceil(num_features / INT8_STEP)
        planes = 2 if self.point.rule == "all" else 1
        cost.steps = cost.plain_steps * planes
        cost.steps += num_outputs * math.ceil(num_hot / FLOAT_STEP)
        groups = [g for g in (self.point.activation_group, self.point.weight_group) if g]
        cost.conversions = num_outputs * (math.ceil(num_features / min(groups)) if groups else 1)
        cost.num_outputs = num_outputs

    def _count_tiles(self, x_high: Tensor) -> None:
        rows, columns = (-size % tile for size, tile in zip(x_high.shape, TILE, strict=True))
        padded = nn.functional.pad(x_high != 0, (0, columns, 0, rows))
        tiles = padded.unflatten(1, (-1, TILE_COLUMNS)).unflatten(0, (-1, TILE_ROWS)).any(3).any(1)
        self.cost.flagged += int(tiles.sum())
        self.cost.num_tiles += tiles.numel()


TILE = (TILE_ROWS, TILE_COLUMNS)


def total_cost(linears: Sequence[PointLinear]) -> Cost:
    """Adds the costs; a second plane of a dynamic rule counts where its tiles had outliers."""
    total = Cost()
    for linear in linears:
        for name, value in vars(linear.cost).items():
            setattr(total, name, getattr(total, name) + value)
        cost = linear.cost
        if cost.num_tiles and linear.point.rule != "all":
            total.steps += cost.plain_steps * cost.flagged / cost.num_tiles
    return total


@torch.no_grad()
def check_linear() -> None:
    """Asserts that the fast linear computes what the specification does, on random inputs."""
    generator = torch.Generator().manual_seed(0)
    for num_features in (576, 864, 200):
        linear = nn.Linear(num_features, 96)
        x = torch.randn(40, num_features, generator=generator)
        x[:, 7] *= 30
        features = Features(x.abs().amax(0), x.square().sum(0))
        for point in (
            Point(64),
            Point(LARGEST, hot=0),
            Point(0, rule="row_rms", threshold=4.0),
            Point(64, rule="all"),
            Point(64, activation_group=64, weight_group=64),
        ):
            ours = PointLinear(linear, point, features, False)
            expected = reference.int8_linear(
                x,
                ours.weight_int8,
                ours.col_scale,
                linear.bias,
                outlier_rule=point.rule,
                outlier_threshold=point.threshold,
                hot_columns=ours.hot_columns,
                hot_weight=ours.hot_weight,
                rotation=point.rotation,
                activation_group=point.activation_group,
                weight_group=point.weight_group,
            )
            torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
            block = rotation_block(num_features, point.rotation)
            assert num_features % block == 0, "every block must be whole"
