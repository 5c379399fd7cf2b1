"""From a text and a model to figures, for the command line and the benchmark."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_int8.checkpoint import resolve_model
from dist_int8.config import Settings
from dist_int8.evaluation import report
from dist_int8.evaluation.evaluate import (
    DEFAULT_WINDOW,
    Evaluation,
    EvaluationOptions,
    evaluate,
    with_outlier_features,
)
from dist_int8.evaluation.methods import METHODS
from dist_int8.evaluation.texts import calibration_text as read_calibration_text
from dist_int8.evaluation.texts import read_text, tokens_of
from dist_int8.models import ModelSpec, describe, load_config
from dist_int8.models.tokenizer import load_tokenizer

CALIBRATION_TOKENS = 2048
_SETTINGS = (  # that decide the figures
    *("accuracy", "rotation", "outlier_rule", "outlier_threshold", "calibrate", "num_hot_columns"),
    *("head", "embedding", "kv", "dtype"),
)


@dataclass(frozen=True)
class TextOptions:
    """What to measure on, and how.

    Attributes:
        text: file or folder; None: Python's help topics.
        calibration_text: file or folder of which 2,048 tokens are for the methods that need
            activations; None: docstrings of Python's standard library.
        first_token: number of tokens to skip.
        num_tokens: maximum number of tokens; None: all.
        seed: seed of the outlier features to give the model first; None: no outlier features.
        window: number of tokens that the model sees at once; None: 1,024, or the model's limit.
        stride: number of tokens from one window to the next; None: the window.
        batch: number of windows that run together; None: one per stage.
        at_once: number of methods in memory at a time; None: all.
        reference: dtype of the floating-point model: "fp32", "bf16" or "none".
        layer_tokens: number of tokens for errors of layers; 0: none.
    """

    text: str | Path | None = None
    calibration_text: str | Path | None = None
    first_token: int = 0
    num_tokens: int | None = None
    seed: int | None = None
    window: int | None = None
    stride: int | None = None
    batch: int | None = None
    at_once: int | None = None
    reference: Any = "fp32"
    layer_tokens: int = 512


def measure_text(
    settings: Settings, methods: Sequence[str], options: TextOptions, *, progress: bool = True
) -> tuple[Evaluation, dict[str, Any]]:
    """Measures methods on a text; sets torch's threads to the settings' threads_per_stage.

    Args:
        settings: settings of the runtime, with a model.
        methods: names from `METHODS`.
        options: what to measure on, and how.
        progress: whether to show a bar on stderr.

    Returns:
        What was measured, and its figures (`report.as_dict`) with model, text and settings.

    Raises:
        ValueError: there is no such text or model, the text is shorter than a window, or as `load`.
    """
    assert settings.model is not None
    # names are checked before anything is loaded
    content, text_name = read_text(options.text)
    other = None
    if options.calibration_text is not None or any(METHODS[name].calibrated for name in methods):
        other = read_calibration_text(options.calibration_text)
    name = Path(settings.model).name
    settings, folder = _resolve_model(settings)
    if settings.threads_per_stage is not None:
        torch.set_num_threads(settings.threads_per_stage)
    spec = describe(load_config(folder))
    tokenizer = load_tokenizer(folder, vocab_size=spec.vocab_size)
    tokens = _read_tokens(tokenizer, content, text_name, options)
    calibration = None if other is None else tokens_of(tokenizer, other[0], CALIBRATION_TOKENS)
    asked = _evaluation_options(settings, spec, options)
    with contextlib.ExitStack() as stack:
        if options.seed is not None:
            settings = stack.enter_context(with_outlier_features(settings, options.seed))
        found = evaluate(settings, tokens, methods, asked, calibration, progress)
    return found, {
        "model": name,
        "text": text_name,
        "first_token": options.first_token,
        "calibration_text": None if other is None else other[1],
        "outlier_features_seed": options.seed,
        "settings": {key: getattr(settings, key) for key in _SETTINGS},
        "threads": torch.get_num_threads(),
        **report.as_dict(found),
    }


def _resolve_model(settings: Settings) -> tuple[Settings, Path]:
    """Finds the model's folder; returns settings that name it, and the folder."""
    assert settings.model is not None
    folder = resolve_model(settings.model, settings.revision, allow_pickle=settings.allow_pickle)
    return settings.model_copy(update={"model": str(folder), "revision": None}), folder


def _read_tokens(tokenizer: Any, content: str, text_name: str, options: TextOptions) -> Tensor:
    tokens = tokens_of(tokenizer, content, options.num_tokens, options.first_token)
    if options.first_token and not len(tokens):
        raise ValueError(
            f"eval: first_token must be below the number of tokens of {text_name}, got "
            f"{options.first_token}; lower --first-token"
        )
    return tokens


def _evaluation_options(
    settings: Settings, spec: ModelSpec, options: TextOptions
) -> EvaluationOptions:
    window = options.window
    if window is None:
        window = min(DEFAULT_WINDOW, spec.max_positions or DEFAULT_WINDOW)
    return EvaluationOptions(
        window=window,
        stride=window if options.stride is None else options.stride,
        batch=options.batch or settings.num_stages or len(settings.devices or "1"),
        reference=options.reference,
        layer_tokens=options.layer_tokens,
        at_once=options.at_once or len(METHODS),
    )
