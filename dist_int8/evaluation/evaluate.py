"""Compares methods on one text: perplexity, agreement, divergence, errors of layers."""

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

from dist_int8.api.load import load
from dist_int8.config import Settings
from dist_int8.evaluation.floating import load_floating_model
from dist_int8.evaluation.host import Host, refuse_int8, without_bars
from dist_int8.evaluation.layers import LayerReport, MakeLayer, runtime_layer, watch_layers
from dist_int8.evaluation.methods import METHODS, REFERENCES
from dist_int8.evaluation.outlier_features import inject_outlier_features
from dist_int8.evaluation.perplexity import Scores, Window, log_probabilities_, windows
from dist_int8.evaluation.progress import Progress
from dist_int8.models import ModelSpec, describe, load_config
from dist_int8.models.tokenizer import read_tokenizer

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class EvaluationOptions:
    """How to measure.

    Attributes:
        window: number of tokens that the model sees at once.
        stride: number of tokens from one window to the next.
        batch: number of windows that run together.
        reference: dtype of the floating-point model that the methods are compared with; it runs in
            the runtime, without int8.
        layer_tokens: number of tokens, from the start of the text, for errors of layers; 0: none.
        at_once: number of methods in memory at a time; each such group runs the reference again.
    """

    window: int = DEFAULT_WINDOW
    stride: int = DEFAULT_WINDOW
    batch: int = 1
    reference: Literal["fp32", "bf16", "none"] = "fp32"
    layer_tokens: int = 512
    at_once: int = len(METHODS)


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        asked: how it was measured.
        num_tokens: number of tokens of the text.
        scores: scores by method, the reference first.
        layers: errors and inputs of single layers; None if they were not measured.
    """

    asked: EvaluationOptions
    num_tokens: int
    scores: dict[str, Scores] = field(default_factory=dict)
    layers: LayerReport | None = None

    @property
    def base(self) -> Scores | None:
        """Scores of the reference; None without one."""
        return self.scores.get(self.asked.reference)


class Subject(Protocol):
    """Something that computes logits."""

    def logits(self, input_ids: Tensor, /) -> Tensor:
        """Computes fp32 logits [batch, tokens, vocab] of token ids [batch, tokens]."""


def evaluate(
    settings: Settings,
    tokens: Tensor,
    methods: Sequence[str],
    asked: EvaluationOptions,
    calibration: Tensor | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures methods on a text.

    Args:
        settings: settings of the runtime; `model` names a folder.
        tokens: token ids of the text, int64 [tokens].
        methods: names from `METHODS`.
        asked: how to measure.
        calibration: token ids of another text, int64 [tokens], for methods that need activations.
        progress: whether to show progress on stderr.

    Raises:
        ValueError: the text is shorter than a window, the window is longer than the model allows,
            or as `load`.
    """
    assert settings.model is not None
    spec = describe(load_config(settings.model))
    _check_window(spec, asked.window)
    places = windows(len(tokens), asked.window, asked.stride)
    names = [] if asked.reference == "none" else [asked.reference]
    found = Evaluation(asked, len(tokens), {name: Scores() for name in (*names, *methods)})
    groups = [methods[i : i + asked.at_once] for i in range(0, len(methods), asked.at_once)] or [[]]
    num_passes = len(methods) + len(groups) * len(names)
    total = num_passes * sum(place.num_targets for place in places)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Progress(total, "token", progress))
        bar.start("loading the model")
        host = reference = None
        if asked.layer_tokens or not all(METHODS[name].in_runtime for name in methods):
            host = Host(settings.model, calibration, allow_pickle=settings.allow_pickle)
        if asked.reference != "none":
            reference = stack.enter_context(load(**reference_settings(settings, asked)))
        run = _Run(settings, spec, tokens, found, host, reference, bar)
        for index, group in enumerate(groups):
            run.measure_group(group, places, found.base if index == 0 else None)
    return found


def _check_window(spec: ModelSpec, window: int) -> None:
    if spec.max_positions is not None and window > spec.max_positions:
        raise ValueError(
            f"eval: window must be at most the model's {spec.max_positions} positions, got "
            f"{window}; lower --window"
        )


@dataclass
class _Run:
    """An evaluation in progress.

    Attributes:
        settings: settings of the runtime.
        spec: spec of the model.
        tokens: token ids of the text, int64 [tokens].
        found: results so far.
        host: transformers' model; None if nothing needs it.
        reference: floating-point model in the runtime; None without one.
        bar: progress, in predicted tokens.
    """

    settings: Settings
    spec: ModelSpec
    tokens: Tensor
    found: Evaluation
    host: Host | None
    reference: Subject | None
    bar: Progress

    def measure_group(
        self, group: Sequence[str], places: Sequence[Window], base: Scores | None
    ) -> None:
        """Measures methods that are in memory together; `base` takes the reference's scores."""
        asked = self.found.asked
        with contextlib.ExitStack() as loaded:
            subjects = {}
            for name in group:
                self.bar.start(f"loading {name}")
                subjects[name] = _open(loaded, self.settings, asked, self.host, name)
            for chunk in _batches(places, asked.batch):
                self._measure_batch(chunk, subjects, base)
        if self.host is None:
            return
        if asked.layer_tokens:
            self._measure_layers(self.host, group)
        self.host.forget(group)

    def _measure_batch(
        self, chunk: list[Window], subjects: dict[str, Subject], base: Scores | None
    ) -> None:
        """Runs one batch of windows through the reference and every method."""
        input_ids = torch.stack([self.tokens[place.begin : place.end] for place in chunk])
        targets = [self.tokens[place.first : place.end + 1] for place in chunk]
        num_targets = sum(map(len, targets))
        wanted = [slice(place.first - 1 - place.begin, None) for place in chunk]
        expected: list[Tensor | None] = [None] * len(chunk)
        if self.reference is not None:
            self.bar.start(self.found.asked.reference)
            logits, seconds = _timed(self.reference, input_ids)
            for i, rows in enumerate(wanted):
                if base is not None:
                    base.add(logits[i, rows], targets[i], None)
                expected[i] = log_probabilities_(logits[i, rows])
            if base is not None:
                base.seconds += seconds
            self.bar.add(num_targets)
        for name, subject in subjects.items():
            self.bar.start(name)
            logits, seconds = _timed(subject, input_ids)
            scores = self.found.scores[name]
            for i, rows in enumerate(wanted):
                scores.add(logits[i, rows], targets[i], expected[i])
            scores.seconds += seconds
            del logits
            self.bar.add(num_targets)

    def _measure_layers(self, host: Host, group: Sequence[str]) -> None:
        """Measures the errors of the group's layers on the start of the text."""
        asked, found = self.found.asked, self.found
        self.bar.start("errors of layers")
        makers = {name: _maker(host, self.settings, self.spec, name) for name in group}
        seen = watch_layers(host, self.tokens[: min(asked.layer_tokens, asked.window)], makers)
        found.layers = found.layers or seen
        found.layers.errors |= seen.errors
        found.layers.second_plane |= seen.second_plane


def reference_settings(settings: Settings, asked: EvaluationOptions) -> dict[str, Any]:
    """Returns the arguments of `load()` for the floating-point model."""
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
    """Provides settings of the same model with outlier features, in a temporary folder.

    In floating point it computes the same function (`evaluation.outlier_features`).

    Raises:
        ValueError: the family is not supported, or the model is an int8 checkpoint.
    """
    assert settings.model is not None
    refuse_int8(settings.model, "name it with --inject-outliers")
    with tempfile.TemporaryDirectory(prefix="dist-int8-features-") as name:
        try:
            with without_bars():
                model: Any = load_floating_model(
                    settings.model, "auto", allow_pickle=settings.allow_pickle
                )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{settings.model}: must be a model that transformers loads in floating point, "
                f"got: {' '.join(str(error).split())}; leave --inject-outliers out"
            ) from None
        inject_outlier_features(model, seed)
        with without_bars():
            model.save_pretrained(name)
        tokenizer = read_tokenizer(settings.model)
        if tokenizer is not None:
            tokenizer.save_pretrained(name)
        del model
        yield settings.model_copy(update={"model": name})


def _arguments(
    settings: Settings, asked: EvaluationOptions, changes: dict[str, Any]
) -> dict[str, Any]:
    values = settings.model_dump(exclude_none=True) | changes
    values |= {"max_tokens": asked.window, "progress": False}
    values["max_sequences"] = max(asked.batch, settings.num_stages or 1)
    return values


def _open(
    stack: contextlib.ExitStack,
    settings: Settings,
    asked: EvaluationOptions,
    host: Host | None,
    name: str,
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
    """A method that computes in transformers' model."""

    host: Host
    method: str

    def logits(self, input_ids: Tensor, /) -> Tensor:
        with self.host.computing(self.method):
            return self.host.logits(input_ids)


def _batches(places: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Yields runs of up to `size` consecutive windows of equal length."""
    chunk: list[Window] = []
    for place in places:
        if chunk and (
            len(chunk) == size or place.end - place.begin != chunk[0].end - chunk[0].begin
        ):
            yield chunk
            chunk = []
        chunk.append(place)
    yield chunk


def _timed(subject: Subject, input_ids: Tensor) -> tuple[Tensor, float]:
    begin = time.perf_counter()
    logits = subject.logits(input_ids)
    return logits, time.perf_counter() - begin


def _maker(host: Host, settings: Settings, spec: ModelSpec, name: str) -> MakeLayer:
    method = METHODS[name]
    if method.in_runtime:
        assert settings.model is not None
        return runtime_layer(host, Path(settings.model), spec, method.changed(settings))
    layers = host.layers(name)
    return lambda linear_name, linear: layers[linear_name]
