"""The command line of `dist-int8 eval`: what int8 costs, on any text."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_int8.config import Settings, load_settings

COMMAND = "dist-int8 eval"
_WHAT, _HOW = "What to measure", "How it is measured"
_LAYOUT, _RUNTIME, _OUTPUT = "Where it runs", "How the runtime runs", "What is shown"


def _option(group: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group, show_default=False)


def _setting(group: str, key: str, *names: str) -> Any:
    """The help of a flag is the sentence of its setting."""
    return _option(group, str(Settings.model_fields[key].description), *names)


def evaluate(
    model: Annotated[str | None, _setting(_WHAT, "model", "--model", "-m")] = None,
    text: Annotated[
        Path | None,
        _option(_WHAT, "A text file, or a folder of them. (default: Python's help topics)"),
    ] = None,
    methods: Annotated[
        str | None,
        _option(_WHAT, "Methods, as in absmax,llm.int8,ours; --list-methods names all."),
    ] = None,
    list_methods: Annotated[
        bool, _option(_WHAT, "Name the methods and end.", "--list-methods")
    ] = False,
    reference: Annotated[
        str, _option(_WHAT, "What they are compared with: fp32, bf16 or none. (default: fp32)")
    ] = "fp32",
    inject_outliers: Annotated[
        int | None,
        _option(
            _WHAT,
            "Give the model outlier features with this seed first, as large models have them; its "
            "floating-point function stays.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        _option(
            _WHAT,
            "Score tasks of lm-evaluation-harness instead, as in lambada_openai,piqa; floating "
            "point beside ours.",
        ),
    ] = None,
    task_folder: Annotated[
        Path | None,
        _option(_WHAT, "Folder of task files for --tasks; data files are relative to it."),
    ] = None,
    limit: Annotated[
        int | None, _option(_HOW, "So many documents of each task at most. (default: all)")
    ] = None,
    fewshot: Annotated[
        int | None, _option(_HOW, "Examples before each question of a task that leaves it open.")
    ] = None,
    tokens: Annotated[
        int | None, _option(_HOW, "So many tokens of the text at most. (default: all)")
    ] = None,
    first_token: Annotated[int, _option(_HOW, "Leave out those before. (default: 0)")] = 0,
    window: Annotated[
        int | None, _option(_HOW, "Tokens seen at once. (default: 1024, or what the model can)")
    ] = None,
    stride: Annotated[
        int | None,
        _option(
            _HOW,
            "Tokens from a window to the next; every token counts once. (default: the window)",
        ),
    ] = None,
    batch: Annotated[
        int | None, _option(_HOW, "Windows that run together. (default: one a stage)")
    ] = None,
    at_once: Annotated[
        int | None,
        _option(
            _HOW,
            "Methods in memory at a time; each group runs the reference again. (default: all)",
        ),
    ] = None,
    calibration_text: Annotated[
        Path | None,
        _option(
            _HOW,
            "Text that smoothquant looks at first. (default: docstrings of Python's library)",
        ),
    ] = None,
    layer_tokens: Annotated[
        int,
        _option(_HOW, "Tokens for errors of single layers; 0 leaves them out. (default: 512)"),
    ] = 512,
    config: Annotated[
        Path | None, _option(_LAYOUT, "YAML file of settings; flags win over it. See configs/.")
    ] = None,
    stages: Annotated[int | None, _setting(_LAYOUT, "stages")] = None,
    gpus: Annotated[int | None, _setting(_LAYOUT, "gpus")] = None,
    devices: Annotated[
        str | None, _option(_LAYOUT, "Device of each stage, as in cuda:0,cuda:1,cpu.")
    ] = None,
    threads: Annotated[
        int | None, _option(_LAYOUT, "CPU threads, of a stage and of transformers' model.")
    ] = None,
    dtype: Annotated[str | None, _setting(_RUNTIME, "dtype")] = None,
    outlier_rule: Annotated[str | None, _setting(_RUNTIME, "outlier_rule")] = None,
    outlier_threshold: Annotated[float | None, _setting(_RUNTIME, "outlier_threshold")] = None,
    calibrate: Annotated[str | None, _setting(_RUNTIME, "calibrate")] = None,
    num_hot_columns: Annotated[int | None, _setting(_RUNTIME, "num_hot_columns")] = None,
    head: Annotated[str | None, _setting(_RUNTIME, "head")] = None,
    embedding: Annotated[str | None, _setting(_RUNTIME, "embedding")] = None,
    kv: Annotated[str | None, _setting(_RUNTIME, "kv")] = None,
    as_json: Annotated[
        bool, _option(_OUTPUT, "One JSON object on stdout, nothing else.", "--json")
    ] = False,
    plot: Annotated[
        Path | None,
        _option(_OUTPUT, "Picture of the methods and of the outlier features: .png, .svg, .pdf."),
    ] = None,
    quiet: Annotated[bool, _option(_OUTPUT, "No progress on stderr.", "--quiet", "-q")] = False,
) -> None:
    """Measure what int8 costs: perplexity, next tokens and KL divergence against floating point.

    Ours beside published methods and other libraries, on 10,240 tokens, a picture too:

        dist-int8 eval -m ./smollm2 --tokens 10240 --plot eval.png

    As hard as a large model, on your own text, only three methods:

        dist-int8 eval -m ./smollm2 --text notes/ --inject-outliers 0 --methods llm.int8,ours

    The runtime alone, where floating point does not fit:

        dist-int8 eval -m ./bloom-int8 --gpus 4 --methods ours --reference none --layer-tokens 0

    Tasks of lm-evaluation-harness, floating point beside ours:

        dist-int8 eval -m ./smollm2 --tasks plays_cloze --task-folder benchmarks/tasks
    """
    if list_methods:
        from dist_int8.evaluation.methods import METHODS

        typer.echo("\n".join(f"{n:16} {m.where:13} {m.title}" for n, m in METHODS.items()))
        return
    if quiet or as_json:  # read when tqdm is imported: for the bars of other libraries
        os.environ["TQDM_DISABLE"] = "1"
    settings = load_settings(
        config,
        source=COMMAND,
        model=model,
        stages=stages,
        gpus=gpus,
        devices=devices.split(",") if devices is not None else None,
        threads_per_stage=threads,
        dtype=dtype,
        outlier_rule=outlier_rule,
        outlier_threshold=outlier_threshold,
        calibrate=calibrate,
        num_hot_columns=num_hot_columns,
        head=head,
        embedding=embedding,
        kv=kv,
    )
    if settings.model is None:
        raise ValueError(
            f"{COMMAND}:model: model must be a folder or a hub id, got none; give --model, or "
            'try --model "$(dist-int8 demo-model)"'
        )
    _check(reference, tokens, first_token, batch, at_once, layer_tokens, inject_outliers)
    if tasks is not None:
        _refuse_with_tasks(text=text, methods=methods, inject_outliers=inject_outliers, plot=plot)
        from dist_int8.evaluation import tasks as harness

        with _stdout_for_us() as stdout:
            scores = harness.compare_tasks(
                settings,
                [name for name in tasks.split(",") if name],
                reference=reference,
                task_folder=task_folder,
                limit=limit,
                num_fewshot=fewshot,
                progress=not (quiet or as_json),
            )
            stdout.write((json.dumps(scores) if as_json else harness.table(scores)) + "\n")
        return
    if plot is not None:
        from dist_int8.evaluation.pictures import check_picture

        check_picture(plot)
    from dist_int8.evaluation.methods import chosen, left_out

    given = methods.split(",") if methods is not None else None
    names = chosen(given)
    from dist_int8.evaluation.on_text import TextOptions, measure_text

    with _stdout_for_us() as stdout:
        found, values = measure_text(
            settings,
            names,
            TextOptions(
                text=text,
                calibration_text=calibration_text,
                first_token=first_token,
                num_tokens=tokens,
                seed=inject_outliers,
                window=window,
                stride=stride,
                batch=batch,
                at_once=at_once,
                reference=reference,
                layer_tokens=layer_tokens,
            ),
            progress=not (quiet or as_json),
        )
        if as_json:
            stdout.write(json.dumps(values) + "\n")
        else:
            from dist_int8.evaluation.report import summary, table

            stdout.write(f"{table(values)}\n\n{summary(values)}\n")
            if missing := left_out(given):
                stdout.write(f"not installed: {', '.join(missing)}\n")
        stdout.flush()
        if plot is not None:
            from dist_int8.evaluation.pictures import draw

            draw(found, plot)


def _check(
    reference: str,
    tokens: int | None,
    first_token: int,
    batch: int | None,
    at_once: int | None,
    layer_tokens: int,
    seed: int | None,
) -> None:
    if reference not in ("fp32", "bf16", "none"):
        raise ValueError(
            f"{COMMAND}:reference: reference must be fp32, bf16 or none, got {reference!r}; "
            "fp32 is the usual one"
        )
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(
            f"{COMMAND}:inject_outliers: inject_outliers must be a seed in 0..2^63-1, got {seed}; "
            "write --inject-outliers 0"
        )
    for key, value, lowest in (
        ("tokens", tokens, 2),
        ("first_token", first_token, 0),
        ("batch", batch, 1),
        ("at_once", at_once, 1),
        ("layer_tokens", layer_tokens, 0),
    ):
        if value is not None and value < lowest:
            raise ValueError(
                f"{COMMAND}:{key}: {key} must be at least {lowest}, got {value}; raise it"
            )


def _refuse_with_tasks(**flags: Any) -> None:
    for key, value in flags.items():
        if value is not None:
            raise ValueError(
                f"{COMMAND}:{key}: {key} must be left out with --tasks, got {str(value)!r}; tasks "
                "compare the settings with floating point"
            )


@contextlib.contextmanager
def _stdout_for_us() -> Iterator[Any]:
    """Our stdout; meanwhile file descriptor 1 is stderr: libraries and other ranks print there."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8", errors="replace") as stdout:
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
