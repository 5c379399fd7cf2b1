"""From a text and a model to figures: what the command line and the benchmark ask for."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

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
from dist_int8.models import describe, load_config
from dist_int8.models.tokenizer import load_tokenizer

CALIBRATION_TOKENS = 2048


def measure_text(
    settings: Settings,
    methods: Sequence[str],
    *,
    text: str | Path | None = None,
    calibration_text: str | Path | None = None,
    first_token: int = 0,
    num_tokens: int | None = None,
    seed: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    at_once: int | None = None,
    reference: Any = "fp32",
    layer_tokens: int = 512,
    progress: bool = True,
    make_tokenizer: Callable[[str | Path], Any] = load_tokenizer,
) -> tuple[Evaluation, dict[str, Any]]:
    """Measures methods on a text; sets torch's threads to the settings' threads_per_stage.

    Args:
        settings: of the runtime, with a model.
        methods: names out of `METHODS`.
        text: file or folder; None: Python's help topics.
        calibration_text: for the methods that look at activations first (2,048 tokens of it); None:
            docstrings of Python's standard library.
        first_token: the tokens before it are left out.
        num_tokens: so many at most.
        seed: of outlier features to give the model first; None: none.
        window: tokens seen at once; None: 1,024, or what the model or the text can.
        stride: None: the window.
        batch: windows that run together; None: one a stage.
        at_once: methods in memory at a time; None: all.
        reference: "fp32", "bf16" or "none".
        layer_tokens: for errors of layers; 0: none.
        progress: show a bar on stderr.
        make_tokenizer: of a folder.

    Returns:
        What was measured, and its figures (`report.as_dict`) with model, text and settings.

    Raises:
        ValueError: no such text or model, a text shorter than a window, or as `load`.
    """
    assert settings.model is not None
    content, text_name = read_text(text)  # a mistake in a name is told before anything is loaded
    other = None
    if calibration_text is not None or any(METHODS[name].calibrated for name in methods):
        other = read_calibration_text(calibration_text)
    folder = resolve_model(settings.model, settings.revision, allow_pickle=settings.allow_pickle)
    name = Path(settings.model).name
    settings = settings.model_copy(update={"model": str(folder), "revision": None})
    if settings.threads_per_stage is not None:
        torch.set_num_threads(settings.threads_per_stage)
    spec = describe(load_config(folder))
    tokenizer = make_tokenizer(folder)
    tokens = tokens_of(tokenizer, content, num_tokens, first_token)
    if first_token and not len(tokens):
        raise ValueError(
            f"eval: first_token must be below the number of tokens of {text_name}, got "
            f"{first_token}; lower --first-token"
        )
    if window is None:
        window = min(DEFAULT_WINDOW, spec.max_positions or DEFAULT_WINDOW)
    calibration = None if other is None else tokens_of(tokenizer, other[0], CALIBRATION_TOKENS)
    asked = EvaluationOptions(
        window=window,
        stride=window if stride is None else stride,
        batch=batch or settings.num_stages or len(settings.devices or "1"),
        reference=reference,
        layer_tokens=layer_tokens,
        at_once=at_once or len(METHODS),
    )
    with contextlib.ExitStack() as stack:
        if seed is not None:
            settings = stack.enter_context(with_outlier_features(settings, seed))
        found = evaluate(settings, tokens, methods, asked, calibration, progress)
    values = {
        "model": name,
        "text": text_name,
        "first_token": first_token,
        "calibration_text": None if other is None else other[1],
        "outlier_features_seed": seed,
        "settings": {
            key: getattr(settings, key)
            for key in (
                *("outlier_rule", "outlier_threshold", "calibrate", "num_hot_columns"),
                *("head", "embedding", "kv", "dtype"),
            )
        },
        "threads": torch.get_num_threads(),
        **report.as_dict(found),
    }
    return found, values
