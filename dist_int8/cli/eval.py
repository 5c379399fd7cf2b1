"""`dist-int8 eval`: measures what int8 costs, on any text or on tasks."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_int8.cli.options import (
    Given,
    config_flag,
    log_flags,
    option,
    setting_flag,
    settings_flags,
    takes,
)
from dist_int8.cli.stdout import take_stdout
from dist_int8.cli.targets import check_picture, named
from dist_int8.config import Settings

COMMAND = "dist-int8 eval"
WHAT, HOW, LAYOUT, RUNTIME, OUTPUT = PANELS = (
    "What to measure",
    "How it is measured",
    "Where it runs",
    "How the runtime runs",
    "What is shown",
)


@dataclass(frozen=True)
class EvalOptions:
    """Options of `eval` alone."""

    text: Annotated[
        Path | None,
        option(WHAT, "A text file or a folder of them. (default: Python's help topics)"),
    ] = None
    methods: Annotated[
        str | None,
        option(WHAT, "Methods, as in absmax,llm.int8,ours; --list-methods names all of them."),
    ] = None
    list_methods: Annotated[bool, option(WHAT, "List the methods and exit.", "--list-methods")] = (
        False
    )
    reference: Annotated[
        str, option(WHAT, "What they are compared with: fp32, bf16 or none. (default: fp32)")
    ] = "fp32"
    inject_outliers: Annotated[
        int | None,
        option(
            WHAT,
            "First give the model outlier features, as large models have them, with this seed; its "
            "floating-point function stays the same.",
        ),
    ] = None
    tasks: Annotated[
        str | None,
        option(
            WHAT,
            "Instead score tasks of lm-evaluation-harness, as in lambada_openai,piqa, in floating "
            "point and in ours.",
        ),
    ] = None
    task_folder: Annotated[
        Path | None,
        option(WHAT, "Folder of task files for --tasks; their data files are relative to it."),
    ] = None
    limit: Annotated[
        int | None, option(HOW, "Maximum number of documents per task. (default: all)")
    ] = None
    fewshot: Annotated[
        int | None,
        option(HOW, "Number of examples before each question, if the task leaves it open."),
    ] = None
    tokens: Annotated[
        int | None, option(HOW, "Maximum number of tokens of the text. (default: all)")
    ] = None
    first_token: Annotated[
        int | None, option(HOW, "Number of tokens of the text to skip first. (default: 0)")
    ] = None
    window: Annotated[
        int | None,
        option(HOW, "Number of tokens seen at once. (default: 1024, or the model's limit)"),
    ] = None
    stride: Annotated[
        int | None,
        option(
            HOW,
            "Number of tokens from one window to the next; every token counts once. (default: the "
            "window)",
        ),
    ] = None
    batch: Annotated[
        int | None, option(HOW, "Number of windows that run together. (default: one per stage)")
    ] = None
    at_once: Annotated[
        int | None,
        option(
            HOW,
            "Number of methods in memory at a time; each group runs the reference again. (default: "
            "all)",
        ),
    ] = None
    calibration_text: Annotated[
        Path | None,
        option(
            HOW,
            "Text that smoothquant calibrates with. (default: docstrings of Python's library)",
        ),
    ] = None
    layer_tokens: Annotated[
        int | None,
        option(
            HOW,
            "Number of tokens that errors of single layers are measured on; 0 skips them. "
            "(default: 512)",
        ),
    ] = None
    json: Annotated[bool, option(OUTPUT, "Print one JSON object and nothing else.", "--json")] = (
        False
    )
    plot: Annotated[
        Path | None,
        option(OUTPUT, "Picture of the methods and of the outlier features: .png, .svg or .pdf."),
    ] = None


@takes(
    EvalOptions,
    [
        *settings_flags(WHAT, "model"),
        config_flag(LAYOUT),
        *settings_flags(LAYOUT, "stages", "gpus", "devices"),
        setting_flag(
            LAYOUT,
            "threads_per_stage",
            text="CPU threads per stage, and of transformers' model.",
        ),
        *settings_flags(RUNTIME, "dtype", "accuracy", "rotation"),
        *settings_flags(RUNTIME, "outlier_rule", "outlier_threshold", "calibrate"),
        *settings_flags(RUNTIME, "num_hot_columns", "head", "embedding", "kv"),
        *log_flags(OUTPUT),
    ],
    PANELS,
)
def evaluate(options: EvalOptions, given: Given) -> None:
    """Measure what int8 costs: perplexity, next tokens and KL divergence against floating point.

    A first look, about two minutes on two cores:

        dist-int8 eval -m ./smollm2 --tokens 2049 --methods ours --plot eval.png

    Ours beside published methods and other libraries, on 10,240 tokens, which takes much longer:

        dist-int8 eval -m ./smollm2 --tokens 10240 --plot eval.png

    As hard as a large model, on your own text, only two methods:

        dist-int8 eval -m ./smollm2 --text notes/ --inject-outliers 0 --methods llm.int8,ours

    The runtime alone, where floating point does not fit:

        dist-int8 eval -m ./bloom-int8 --gpus 4 --methods ours --reference none --layer-tokens 0

    Tasks of lm-evaluation-harness, floating point beside ours:

        dist-int8 eval -m ./smollm2 --tasks plays_cloze --task-folder benchmarks/tasks
    """
    if options.list_methods:
        from dist_int8.evaluation.methods import METHODS

        typer.echo("\n".join(f"{n:16} {m.where:13} {m.title}" for n, m in METHODS.items()))
        return
    quiet = given.quiet or options.json
    if quiet:  # read when tqdm is imported: for the bars of other libraries
        os.environ["TQDM_DISABLE"] = "1"
    settings = given.load_settings(COMMAND)
    if settings.model is None:
        raise ValueError(
            f"{COMMAND}:model: model must be a folder or a hub id, got none; give --model, or "
            'try --model "$(dist-int8 demo-model)"'
        )
    _refuse_without_effect(options)
    _check_values(options)
    check_picture(COMMAND, "plot", options.plot)
    if options.tasks is None:
        _measure_text(settings, options, progress=not quiet)
    else:
        _measure_tasks(settings, options, options.tasks.split(","), progress=not quiet)


def _measure_tasks(
    settings: Settings, options: EvalOptions, tasks: list[str], progress: bool
) -> None:
    """Scores tasks in floating point and in int8, and prints both."""
    from dist_int8.evaluation.tasks import compare_tasks
    from dist_int8.evaluation.tasks import table as format_scores

    with take_stdout() as stdout:
        scores = compare_tasks(
            settings,
            [name for name in tasks if name],
            reference=options.reference,
            task_folder=options.task_folder,
            limit=options.limit,
            num_fewshot=options.fewshot,
            progress=progress,
        )
        stdout.write((json.dumps(scores) if options.json else format_scores(scores)) + "\n")


def _measure_text(settings: Settings, options: EvalOptions, progress: bool) -> None:
    """Measures methods on a text, prints the figures and draws the picture."""
    from dist_int8.evaluation.methods import chosen, left_out

    names = options.methods.split(",") if options.methods is not None else None
    methods = chosen(names)
    from dist_int8.evaluation.on_text import TextOptions, measure_text

    with take_stdout() as stdout:
        found, values = measure_text(
            settings,
            methods,
            TextOptions(
                text=options.text,
                calibration_text=options.calibration_text,
                first_token=options.first_token or 0,
                num_tokens=options.tokens,
                seed=options.inject_outliers,
                window=options.window,
                stride=options.stride,
                batch=options.batch,
                at_once=options.at_once,
                reference=options.reference,
                layer_tokens=512 if options.layer_tokens is None else options.layer_tokens,
            ),
            progress=progress,
        )
        stdout.write(json.dumps(values) if options.json else _format_text(values, left_out(names)))
        stdout.write("\n")
        stdout.flush()
        if options.plot is not None:
            from dist_int8.evaluation.pictures import draw

            with named(options.plot):
                draw(found, options.plot)


def _format_text(values: dict[str, Any], missing: Sequence[str]) -> str:
    """Formats the figures of methods as a table and sentences."""
    from dist_int8.evaluation.report import summary, table

    lines = [table(values), "", summary(values)]
    if missing:
        lines.append(f"not installed: {', '.join(missing)}")
    return "\n".join(lines)


_LOWEST = {
    **{"tokens": 2, "first_token": 0, "batch": 1, "at_once": 1, "layer_tokens": 0},
    **{"window": 1, "stride": 1, "limit": 1, "fewshot": 0},
}


def _check_values(options: EvalOptions) -> None:
    if options.reference not in ("fp32", "bf16", "none"):
        raise ValueError(
            f"{COMMAND}:reference: reference must be fp32, bf16 or none, got "
            f"{options.reference!r}; fp32 is the usual one"
        )
    seed = options.inject_outliers
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(
            f"{COMMAND}:inject_outliers: inject_outliers must be a seed in 0..2^63-1, got {seed}; "
            "write --inject-outliers 0"
        )
    for key in ("text", "calibration_text"):
        path = getattr(options, key)
        if path is not None and path.is_char_device():  # /dev/zero has no end
            raise ValueError(
                f"{COMMAND}:{key}: --{key.replace('_', '-')} must be a file or a folder, got the "
                f"device {str(path)!r}; check the path"
            )
    for key, least in _LOWEST.items():
        value = getattr(options, key)
        if value is not None and value < least:
            flag = "--" + key.replace("_", "-")
            raise ValueError(
                f"{COMMAND}:{key}: {flag} must be at least {least}, got {value}; raise it"
            )


_OF_TEXT = (
    *("text", "methods", "inject_outliers", "plot", "tokens", "first_token", "window", "stride"),
    *("batch", "at_once", "calibration_text", "layer_tokens"),
)
_OF_TASKS = ("task_folder", "limit", "fewshot")


def _refuse_without_effect(options: EvalOptions) -> None:
    """Refuses the options of a text beside --tasks, and those of tasks without it."""
    has_tasks = options.tasks is not None
    for key in _OF_TEXT if has_tasks else _OF_TASKS:
        value = getattr(options, key)
        if value is None:
            continue
        flag = "--" + key.replace("_", "-")
        raise ValueError(
            f"{COMMAND}:{key}: {flag} must be left out "
            + (
                f"with --tasks, got {str(value)!r}; tasks compare the settings with floating point"
                if has_tasks
                else f"without --tasks, got {str(value)!r}; add --tasks or leave it out"
            )
        )
