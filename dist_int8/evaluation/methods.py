"""The methods that are compared, as data: each has a name and says how to make its model.

Methods "in the runtime" are settings of `dist_int8.load()` and measure the pipeline itself. Methods
"in transformers" replace the linears of transformers' fp32 model, all but the head.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from dist_int8.config import Settings
from dist_int8.config.accuracy import DEFAULT_POINT, POINTS
from dist_int8.evaluation import linears
from dist_int8.evaluation.linears import Matrix


@dataclass(frozen=True)
class Method:
    """One way to compute a model.

    Attributes:
        title: name in tables.
        settings: changes to the user's settings, for a method in the runtime.
        hot: whether a method in the runtime has hot columns (found on random tokens unless the
            settings say otherwise); None: as in the settings.
        linear: function that makes the replacement of one linear, for a method in transformers.
        needs: name of the package that must be installed; None: none.
        calibrated: whether `linear` needs the activations' absmax on a calibration text.
    """

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    hot: bool | None = None
    linear: Callable[[Matrix], nn.Module] | None = None
    needs: str | None = None
    calibrated: bool = False

    @property
    def in_runtime(self) -> bool:
        return self.linear is None

    def changed(self, settings: Settings) -> Settings:
        """Returns the runtime's settings for this method."""
        return settings.model_copy(update=dict(self.settings) | self._hot(settings))

    def _hot(self, settings: Settings) -> dict[str, Any]:
        if self.hot is None:
            return {}
        if not self.hot:
            return {"calibrate": "off"}
        found = settings.calibrate if settings.calibrate != "off" else "random"
        usual = POINTS[DEFAULT_POINT].num_hot_columns
        return {"calibrate": found, "num_hot_columns": settings.num_hot_columns or usual}

    @property
    def where(self) -> str:
        return "runtime" if self.in_runtime else "transformers"


def _rule(title: str, rule: str, threshold: float, rotation: int, hot: bool) -> Method:
    changes = {"outlier_rule": rule, "outlier_threshold": threshold, "rotation": rotation}
    return Method(f"{title}, hot columns" if hot else title, changes, hot)


_RULES = {
    "none": ("runtime, no outliers", "none", 0.0, 0),
    "absolute-6": ("runtime, abs >= 6.0", "absolute", 6.0, 0),
    "row_rms-6": ("runtime, 6 x row RMS", "row_rms", 6.0, 0),
    "row_rms-4": ("runtime, 4 x row RMS", "row_rms", 4.0, 0),
    "all": ("runtime, two full planes", "all", 0.0, 0),
    "rotated-16": ("runtime, rotated in blocks of 16", "none", 0.0, 16),
    "rotated-64": ("runtime, rotated in blocks of 64", "none", 0.0, 64),
    "rotated-256": ("runtime, rotated in blocks of 256", "none", 0.0, 256),
    "rotated-64-all": ("runtime, rotated in blocks of 64, two full planes", "all", 0.0, 64),
}
_UNSET = dict.fromkeys(("rotation", "outlier_rule", "outlier_threshold", "num_hot_columns"))


def _point(name: str) -> Method:
    """A named point as `quantize` makes it, whatever else is set."""
    changes = {"accuracy": name, **_UNSET}
    return Method(f"ours, {name}", changes, hot=POINTS[name].num_hot_columns > 0)


METHODS: dict[str, Method] = {
    "transformers": Method("transformers, floating point", linear=linears.Floating),
    "weights-only": Method("int8 weights, exact activations", linear=linears.WeightsOnly),
    "absmax": Method("absmax, one scale per tensor", linear=linears.Absmax),
    "zeropoint": Method("zero point, one scale per tensor", linear=linears.ZeroPoint),
    "row-wise": Method("row-wise", linear=linears.RowWise),
    "vector-wise": Method("vector-wise (naive W8A8)", linear=linears.VectorWise),
    "llm.int8": Method("LLM.int8() as published, abs >= 6.0", linear=linears.LlmInt8),
    "smoothquant": Method(
        "SmoothQuant-style W8A8, alpha 0.5", linear=linears.SmoothQuant, calibrated=True
    ),
    "bitsandbytes": Method(
        "bitsandbytes, threshold 6.0",
        linear=partial(linears.bitsandbytes_linear, threshold=6.0),
        needs="bitsandbytes",
    ),
    "bitsandbytes-0": Method(
        "bitsandbytes, threshold 0",
        linear=partial(linears.bitsandbytes_linear, threshold=0.0),
        needs="bitsandbytes",
    ),
    "torchao": Method(
        "torchao, int8 dynamic activations", linear=linears.torchao_linear, needs="torchao"
    ),
    "ours": Method("ours, as set"),
    **{name: _point(name) for name in POINTS},
    "ours-head": Method("ours, head in int8", {"head": "int8"}),
    "ours-embedding": Method("ours, embedding in int8", {"embedding": "int8"}),
    "ours-kv": Method("ours, keys and values in int8", {"kv": "int8"}),
    **{name: _rule(*rule, hot=False) for name, rule in _RULES.items()},
    **{f"{name}+hot": _rule(*rule, hot=True) for name, rule in _RULES.items()},
}

# The methods compared by default; those whose package is not installed are left out.
DEFAULT = (
    "weights-only",
    "absmax",
    "zeropoint",
    "row-wise",
    "vector-wise",
    "llm.int8",
    "smoothquant",
    "bitsandbytes",
    "bitsandbytes-0",
    "torchao",
    "ours",
)
REFERENCES = {"fp32": "float32", "bf16": "bfloat16"}


def chosen(names: Sequence[str] | None) -> list[str]:
    """Returns the requested names, checked; None: the default methods that can run here.

    Raises:
        ValueError: a method is unknown, named twice, or needs a package that is not installed.
    """
    if names is None:
        return [name for name in DEFAULT if not _missing(METHODS[name])]
    for name in names:
        if name not in METHODS:
            raise ValueError(
                f"eval: methods must be among {', '.join(METHODS)}, got {name!r}; the "
                "floating-point model is --reference"
            )
        if package := _missing(METHODS[name]):
            raise ValueError(
                f"eval: method {name} needs {package} installed, got none; "
                f"pip install {'--no-deps ' if package == 'torchao' else ''}{package}"
            )
    if len(set(names)) != len(names) or not names:
        raise ValueError(
            f"eval: methods must be distinct names, got {','.join(names) or 'none'}; name each once"
        )
    return list(names)


def left_out(names: Sequence[str] | None) -> list[str]:
    """Lists the default methods that cannot run here and the packages that they need."""
    if names is not None:
        return []
    return [f"{name} ({package})" for name in DEFAULT if (package := _missing(METHODS[name]))]


def _missing(method: Method) -> str | None:
    """Returns the package that a method needs if it is not installed."""
    if method.needs is None or importlib.util.find_spec(method.needs) is not None:
        return None
    return method.needs
