"""Methods side by side on one text: perplexity, agreement, divergence, errors of layers."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_int8.api.load import load
from dist_int8.config import Settings
from dist_int8.evaluation.host import Host, refuse_int8, without_bars
from dist_int8.evaluation.layers import LayerReport, MakeLayer, runtime_layer, watch_layers
from dist_int8.evaluation.methods import METHODS, REFERENCES
from dist_int8.evaluation.outlier_features import inject_outlier_features
from dist_int8.evaluation.perplexity import Scores, Window, log_probabilities_, windows
from dist_int8.evaluation.progress import Progress
from dist_int8.models import describe, load_config

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Asked:
    """How to measure.

    Attributes:
        window: tokens that a model sees at once.
        stride: tokens from a window to the next.
        batch: windows that run together.
        reference: what the methods are compared with, in the runtime without int8.
        layer_tokens: of the text's beginning, for errors of layers; 0: no look at layers.
        at_once: methods in memory at a time; each such group runs the reference again.
    """

    window: int = DEFAULT_WINDOW
    stride: int = DEFAULT_WINDOW
    batch: int = 1
    reference: Literal["fp32", "bf16", "none"] = "fp32"
    layer_tokens: int = 512
    at_once: int = len(METHODS)


@dataclass
class Evaluation:
    """What was measured: scores by method (the reference first), and the layers."""

    asked: Asked
    num_tokens: int
    scores: dict[str, Scores] = field(default_factory=dict)
    layers: LayerReport | None = None

    @property
    def base(self) -> Scores | None:
        """Scores of the reference; None without one."""
        return self.scores.get(self.asked.reference)


class Subject(Protocol):
    """Something with logits."""

    def logits(self, input_ids: Tensor, /) -> Tensor:
        """[batch, tokens] -> fp32 [batch, tokens, vocab]."""


def evaluate(
    settings: Settings,
    tokens: Tensor,
    methods: Sequence[str],
    asked: Asked,
    calibration: Tensor | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures methods on a text.

    Args:
        settings: of the runtime; `model` names a folder.
        tokens: the text, int64 [tokens].
        methods: names out of `METHODS`.
        asked: how.
        calibration: other text for methods that look at activations first, int64 [tokens].
        progress: show on stderr how far it is.

    Raises:
        ValueError: a text shorter than a window, a window longer than the model's, or as `load`.
    """
    assert settings.model is not None
    spec = describe(load_config(settings.model))
    if spec.max_positions is not None and asked.window > spec.max_positions:
        raise ValueError(
            f"eval: window must be at most the model's {spec.max_positions} positions, got "
            f"{asked.window}; lower --window"
        )
    places = windows(len(tokens), asked.window, asked.stride)
    found = Evaluation(asked, len(tokens))
    names = [] if asked.reference == "none" else [asked.reference]
    found.scores = {name: Scores() for name in (*names, *methods)}
    groups = [methods[i : i + asked.at_once] for i in range(0, len(methods), asked.at_once)] or [[]]
    num_passes = len(methods) + len(groups) * len(names)
    total = num_passes * sum(place.num_targets for place in places)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Progress(total, "token", progress))
        bar.start("loading the model")
        host = None
        if asked.layer_tokens or not all(METHODS[name].in_runtime for name in methods):
            host = Host(settings.model, calibration)
        reference = None
        if asked.reference != "none":
            reference = stack.enter_context(load(**reference_settings(settings, asked)))
        for index, group in enumerate(groups):
            with contextlib.ExitStack() as loaded:
                subjects = {}
                for name in group:
                    bar.start(f"loading {name}")
                    subjects[name] = _open(loaded, settings, asked, host, name)
                base = found.base if index == 0 else None
                for chunk in _batches(places, asked.batch):
                    _measure(tokens, chunk, reference, base, subjects, found, bar)
            if host is not None and asked.layer_tokens:
                bar.start("errors of layers")
                makers = {name: _maker(host, settings, spec, name) for name in group}
                ids = tokens[: min(asked.layer_tokens, asked.window)]
                seen = watch_layers(host, ids, makers)
                found.layers = found.layers or seen
                found.layers.errors |= seen.errors
                found.layers.second_plane |= seen.second_plane
            if host is not None:
                host.forget(group)
    return found


def reference_settings(settings: Settings, asked: Asked) -> dict[str, Any]:
    """Arguments of `load()` for the floating-point model."""
    changes = {
        "int8": False,
        "dtype": REFERENCES[asked.reference],
        "calibrate": "off",
        "embedding": "16bit",
        "kv": "16bit",
        "head": None,
    }
    return _arguments(settings, asked, changes)


@contextlib.contextmanager
def with_outlier_features(settings: Settings, seed: int) -> Iterator[Settings]:
    """Settings of the same model with outlier features, in a folder of its own for a while.

    It computes the same function in floating point (`models.outlier_features`). Raises ValueError
    for a family that they are not described for, and for an int8 checkpoint.
    """
    assert settings.model is not None
    refuse_int8(settings.model, "name it with --inject-outliers")
    with tempfile.TemporaryDirectory(prefix="dist-int8-features-") as name:
        try:
            with without_bars():
                model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{settings.model}: must be a model that transformers loads in floating point, "
                f"got: {' '.join(str(error).split())}; leave --inject-outliers out"
            ) from None
        inject_outlier_features(model, seed)
        with without_bars():
            model.save_pretrained(name)
        with contextlib.suppress(OSError, ValueError):
            AutoTokenizer.from_pretrained(settings.model).save_pretrained(name)
        del model
        yield settings.model_copy(update={"model": name})


def _arguments(settings: Settings, asked: Asked, changes: dict[str, Any]) -> dict[str, Any]:
    values = settings.model_dump(exclude_none=True) | changes
    values |= {"max_tokens": asked.window, "progress": False}
    values["max_sequences"] = max(asked.batch, settings.num_stages or 1)
    return values


def _open(
    stack: contextlib.ExitStack, settings: Settings, asked: Asked, host: Host | None, name: str
) -> Subject:
    method = METHODS[name]
    if method.in_runtime:
        changed = method.changed(settings)
        return stack.enter_context(load(**_arguments(changed, asked, {})))
    assert host is not None
    host.layers(name)
    return _Hosted(host, name)


@dataclass(frozen=True)
class _Hosted:
    """A method in transformers' model."""

    host: Host
    method: str

    def logits(self, input_ids: Tensor, /) -> Tensor:
        with self.host.computing(self.method):
            return self.host.logits(input_ids)


def _batches(places: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Up to `size` windows in a row that are equally long."""
    chunk: list[Window] = []
    for place in places:
        if chunk and (
            len(chunk) == size or place.end - place.begin != chunk[0].end - chunk[0].begin
        ):
            yield chunk
            chunk = []
        chunk.append(place)
    yield chunk


def _measure(
    tokens: Tensor,
    chunk: list[Window],
    reference: Subject | None,
    base: Scores | None,
    subjects: dict[str, Subject],
    found: Evaluation,
    bar: Progress,
) -> None:
    """One batch of windows through the reference and every method. `base`: where it is noted."""
    input_ids = torch.stack([tokens[place.begin : place.end] for place in chunk])
    targets = [tokens[place.first : place.end + 1] for place in chunk]
    num_targets = sum(map(len, targets))
    wanted = [slice(place.first - 1 - place.begin, None) for place in chunk]
    expected: list[Tensor | None] = [None] * len(chunk)
    if reference is not None:
        bar.start(found.asked.reference)
        logits, seconds = _timed(reference, input_ids)
        for i, rows in enumerate(wanted):
            if base is not None:
                base.add(logits[i, rows], targets[i], None)
            expected[i] = log_probabilities_(logits[i, rows])
        if base is not None:
            base.seconds += seconds
        bar.add(num_targets)
    for name, subject in subjects.items():
        bar.start(name)
        logits, seconds = _timed(subject, input_ids)
        scores = found.scores[name]
        for i, rows in enumerate(wanted):
            scores.add(logits[i, rows], targets[i], expected[i])
        scores.seconds += seconds
        del logits
        bar.add(num_targets)


def _timed(subject: Subject, input_ids: Tensor) -> tuple[Tensor, float]:
    begin = time.perf_counter()
    logits = subject.logits(input_ids)
    return logits, time.perf_counter() - begin


def _maker(host: Host, settings: Settings, spec: Any, name: str) -> MakeLayer:
    method = METHODS[name]
    if method.in_runtime:
        assert settings.model is not None
        return runtime_layer(host, Path(settings.model), spec, method.changed(settings))
    layers = host.layers(name)
    return lambda linear_name, linear: layers[linear_name]
