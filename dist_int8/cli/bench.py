"""The command line of `dist-int8 bench`: a device, for the plan; a pipeline, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_int8.config import write_yaml

COMMAND = "dist-int8 bench"
_DEVICE, _PICTURE = "A device, for the plan", "A pipeline at work, as a picture"
NUM_SEQUENCES, NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 8, 16, 16


def _option(group: str, text: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=group, **more)


def bench(
    profile: Annotated[
        Path | None, _option(_DEVICE, "YAML file to write, for `dist-int8 plan --profile`.")
    ] = None,
    device: Annotated[str, _option(_DEVICE, "cpu or cuda:N.")] = "cpu",
    threads: Annotated[
        int | None, _option(_DEVICE, "CPU threads; those of one stage.", min=1)
    ] = None,
    name: Annotated[str | None, _option(_DEVICE, "What the plan calls it.")] = None,
    plot: Annotated[
        Path | None, _option(_PICTURE, "Picture to draw: timeline.png, .svg or .pdf.")
    ] = None,
    trace: Annotated[
        Path | None,
        _option(_PICTURE, "Of this file from `generate --trace`; without it of a short run."),
    ] = None,
    model: Annotated[
        str | None, _option(_PICTURE, "What the short run runs; default: the demo model.")
    ] = None,
    stages: Annotated[int, _option(_PICTURE, "Its stages, one thread of the CPU each.", min=1)] = 2,
) -> None:
    """Measure how fast a device reads and multiplies, or draw which stage did what when.

    For the planner, a few seconds:

        dist-int8 bench --profile my-cpu.yaml --threads 1

    A picture of a short run, or of one that `dist-int8 generate --trace` wrote down:

        dist-int8 bench --plot timeline.png --stages 2
        dist-int8 bench --plot timeline.png --trace trace.json
    """
    if plot is None and (trace is not None or model is not None):
        raise ValueError(
            f"{COMMAND}:plot: --plot must be given with --trace or --model, got none; add "
            "--plot timeline.png"
        )
    if profile is None and plot is None:
        raise ValueError(
            f"{COMMAND}:profile: --profile or --plot must be given, got neither; add "
            "--profile my-cpu.yaml or --plot timeline.png"
        )
    if trace is not None and model is not None:
        raise ValueError(
            f"{COMMAND}:model: --model must be left out with --trace, got both; keep one"
        )
    if profile is not None:
        from dist_int8.profiling.device import measure

        values: dict[str, Any] = measure(device, threads, name)
        write_yaml(profile, values, f"Measured by `{COMMAND} --profile` on {values['name']}.")
        typer.echo("\n".join(_lines(values)))
    if plot is not None:
        from dist_int8.profiling.timeline import plot as draw

        if trace is None:
            trace = plot.with_suffix(".trace.json")
            _short_run(model, stages, trace)
        typer.echo(draw(trace, plot))


def _lines(values: dict[str, Any]) -> Sequence[str]:
    return [
        f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}"
        for key, value in values.items()
    ]


def _short_run(model: str | None, stages: int, trace: Path) -> None:
    """A few prompts of any tokens through the pipeline; writes when each stage did what."""
    from dist_int8.api.load import load
    from dist_int8.cli.demo_model import demo_model

    with load(
        model or demo_model(),
        devices=["cpu"] * stages,
        threads_per_stage=1,
        max_sequences=NUM_SEQUENCES,
        max_tokens=NUM_PROMPT_TOKENS + NUM_NEW_TOKENS,
        progress=False,
    ) as loaded:
        prompts = [[1 + i] * NUM_PROMPT_TOKENS for i in range(NUM_SEQUENCES)]
        loaded.generate(prompts, max_new_tokens=2)  # the first call of a process is slower
        warm = loaded.trace.last_step
        loaded.generate(prompts, max_new_tokens=NUM_NEW_TOKENS)
        loaded.trace.save(trace, since=warm)
