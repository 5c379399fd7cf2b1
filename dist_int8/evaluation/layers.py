"""Errors of single linear layers, and outlier features, on real activations."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_int8.checkpoint import find_hot_columns, make_calibration
from dist_int8.config import Settings
from dist_int8.evaluation.host import Host
from dist_int8.int8 import ops
from dist_int8.int8.linear import Int8Linear
from dist_int8.models import ModelSpec, StageSlice, resolve_skip, tensor_sources

# The LLM.int8() paper counts an input feature of a layer as an outlier feature (section 4) if its
# magnitude is at least 6.0 in at least 6% of the tokens.
MAGNITUDE = 6.0
SHARE_OF_TOKENS = 0.06
MICRO_BATCH = 16
_TOP = 8

MakeLayer = Callable[[str, nn.Linear], nn.Module]


@dataclass
class Inputs:
    """The input features of one or several linears that read the same x [tokens, K].

    Attributes:
        names: names of the linears.
        absmax: largest magnitude of each feature, [K].
        share: share of the tokens in which the feature's magnitude is at least 6.0, [K].
        rms: median over the tokens of their row's root mean square.
    """

    names: list[str]
    absmax: Tensor
    share: Tensor
    rms: float

    @property
    def outlier_features(self) -> Tensor:
        """Outlier features as the paper counts them, int64 ascending."""
        return (self.share >= SHARE_OF_TOKENS).nonzero()[:, 0]

    @property
    def ratio(self) -> Tensor:
        """Largest magnitude of each feature, in units of the median RMS, [K]."""
        return self.absmax / max(self.rms, torch.finfo(torch.float32).tiny)

    def as_dict(self) -> dict[str, Any]:
        largest = self.ratio.topk(min(_TOP, len(self.ratio)))
        features = self.outlier_features
        return {
            "linears": self.names,
            "num_features": len(self.absmax),
            "rms": self.rms,
            "num_outlier_features": len(features),
            "outlier_features": features[: 8 * _TOP].tolist(),
            "largest": [
                {"feature": feature, "times_rms": ratio}
                for feature, ratio in zip(
                    largest.indices.tolist(), largest.values.tolist(), strict=True
                )
            ],
        }


@dataclass
class LayerReport:
    """What was measured of the linears.

    Attributes:
        errors: relative error ||output - floating|| / ||floating||, by method and linear.
        inputs: inputs of all linears, in the order in which they run.
        second_plane: share of x that the second plane carries, by method of the runtime and linear:
            the share of its elements, and of the input features with such an element in a
            micro-batch of 16 tokens (whose products cannot be skipped).
    """

    errors: dict[str, dict[str, float]]
    inputs: list[Inputs]
    second_plane: dict[str, dict[str, tuple[float, float]]]

    def summary(self, method: str) -> dict[str, Any]:
        """Returns median and worst error of a method, the worst linear, the mean second plane."""
        errors = self.errors[method]
        worst = max(errors, key=errors.__getitem__)
        found: dict[str, Any] = {
            "median": statistics.median(errors.values()),
            "worst": errors[worst],
            "worst_linear": worst,
        }
        if planes := list(self.second_plane.get(method, {}).values()):
            elements, features = zip(*planes, strict=True)
            found["second_plane_percent"] = {
                "elements": 100 * statistics.fmean(elements),
                "features": 100 * statistics.fmean(features),
            }
        return found


def watch_layers(
    host: Host, token_ids: Tensor, makers: Mapping[str, MakeLayer] | None = None
) -> LayerReport:
    """Runs the floating-point model once and every method's layer on the inputs of each linear.

    The inputs are those of the floating-point model, so errors do not accumulate over the layers.

    Args:
        host: host whose model computes in floating point.
        token_ids: token ids, int64 [tokens].
        makers: for each method, the function that makes its layer for a linear and its name.
    """
    report = LayerReport({method: {} for method in makers or {}}, [], {})
    last: list[Tensor] = []  # x of the previous linear: the same tensor means the same inputs

    def look(name: str, linear: nn.Linear, x: Tensor, y: Tensor) -> None:
        if last and last[0] is x:
            report.inputs[-1].names.append(name)
        else:
            report.inputs.append(_inputs(name, x.reshape(-1, x.shape[-1])))
            last[:] = [x]
        size = y.double().norm()
        for method, make in (makers or {}).items():
            layer = make(name, linear)
            error = (layer(x).double() - y.double()).norm()
            report.errors[method][name] = (error / size).item() if size > 0 else error.item()
            if isinstance(layer, Int8Linear):
                report.second_plane.setdefault(method, {})[name] = _second_plane(layer, x)

    def hook(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: look(name, module, arguments[0], output)

    hooks = [linear.register_forward_hook(hook(name)) for name, linear in host.linears.items()]
    try:
        host.logits(token_ids[None])
    finally:
        for handle in hooks:
            handle.remove()
    return report


def runtime_layer(host: Host, folder: str | Path, spec: ModelSpec, settings: Settings) -> MakeLayer:
    """Returns a function that makes the runtime's `Int8Linear` for a linear of the host.

    The settings decide its hot columns. The runtime fuses some linears (query, key and value),
    which changes no output, since scales and outliers belong to rows.
    """
    hot = hot_columns(folder, spec, settings, host.linears)
    numerics = settings.numerics

    def make(name: str, linear: nn.Linear) -> nn.Module:
        return Int8Linear.from_linear(
            linear,
            numerics.outlier_threshold,
            numerics.outlier_rule,
            hot.get(name),
            numerics.rotation,
        )

    return make


def hot_columns(
    folder: str | Path, spec: ModelSpec, settings: Settings, linears: Mapping[str, nn.Linear]
) -> dict[str, list[int]]:
    """Returns the hot columns that `load()` finds, by transformers' names of the linears."""
    numerics = settings.numerics
    counts = numerics.num_hot_columns, numerics.down_hot_columns
    calibration = make_calibration(folder, spec, settings.calibrate, *counts)
    if calibration is None:
        return {}
    skip = resolve_skip(spec, settings.skipped, "eval:skip_modules")
    found = find_hot_columns(folder, spec, calibration, skip=skip)
    sources = tensor_sources(spec, StageSlice(range(spec.num_blocks), first=False, last=False))
    named: dict[str, list[int]] = {}
    for ours, columns in found.items():
        for spellings in sources[f"{ours}.weight"].names:
            theirs = (spelling.removesuffix(".weight") for spelling in spellings)
            named |= {name: columns for name in theirs if name in linears}
    return named


def _second_plane(layer: Int8Linear, x: Tensor) -> tuple[float, float]:
    rows = ops.quantize_rows(x.reshape(-1, layer.in_features), *layer.quantization)
    if not len(rows.x_high):  # the rule has no second plane
        return 0.0, 0.0
    high = rows.x_high != 0
    whole = high[: len(high) // MICRO_BATCH * MICRO_BATCH]
    tiles = whole.view(-1, MICRO_BATCH, layer.in_features) if len(whole) else high[None]
    return high.float().mean().item(), tiles.any(1).float().mean().item()


def _inputs(name: str, x: Tensor) -> Inputs:
    size = x.abs()
    return Inputs(
        [name],
        size.amax(0),
        (size >= MAGNITUDE).float().mean(0),
        x.square().mean(1).sqrt().median().item(),
    )
