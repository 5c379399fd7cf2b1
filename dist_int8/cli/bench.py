"""`dist-int8 bench`: measures a device for the plan, or draws a pipeline at work."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_int8.cli.options import Given, log_flags, option, takes
from dist_int8.cli.targets import check_picture, check_target
from dist_int8.config import MAX_STAGES, write_yaml

COMMAND = "dist-int8 bench"
DEVICE, PICTURE = "A device, for the plan", "A pipeline at work, as a picture"
_NEEDS = {  # option -> the one without which it does nothing
    **dict.fromkeys(("trace", "model", "stages"), "plot"),
    **dict.fromkeys(("device", "threads", "name"), "profile"),
}
_EXAMPLES = {"plot": "timeline.png", "profile": "my-cpu.yaml"}
NUM_SEQUENCES, NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 8, 16, 16


@dataclass(frozen=True)
class BenchOptions:
    """Options of `bench`."""

    profile: Annotated[
        Path | None, option(DEVICE, "YAML file to write, for `dist-int8 plan --profile`.")
    ] = None
    device: Annotated[str | None, option(DEVICE, "cpu or cuda:N. (default: cpu)")] = None
    threads: Annotated[
        int | None, option(DEVICE, "Number of CPU threads, those of one stage.", min=1)
    ] = None
    name: Annotated[str | None, option(DEVICE, "Name of the device in the plan.")] = None
    plot: Annotated[
        Path | None, option(PICTURE, "Picture to draw: timeline.png, .svg or .pdf.")
    ] = None
    trace: Annotated[
        Path | None,
        option(
            PICTURE, "File of `generate --trace` to draw. (default: that of a short run, made now)"
        ),
    ] = None
    model: Annotated[
        str | None, option(PICTURE, "Model of the short run. (default: the demo model)")
    ] = None
    stages: Annotated[
        int | None,
        option(
            PICTURE,
            "Number of stages of the short run, one CPU thread each. (default: 2)",
            min=1,
            max=MAX_STAGES,
        ),
    ] = None


@takes(BenchOptions, log_flags(None))
def bench(options: BenchOptions, given: Given) -> None:
    """Measure how fast a device reads and multiplies, or draw which stage did what when.

    For the planner, a few seconds:

        dist-int8 bench --profile my-cpu.yaml --threads 1

    A picture of a short run, or of one that `dist-int8 generate --trace` recorded:

        dist-int8 bench --plot timeline.png --stages 2
        dist-int8 bench --plot timeline.png --trace trace.json
    """
    _check_flags(options)
    if options.profile is not None:
        from dist_int8.profiling.device import measure

        values: dict[str, Any] = measure(options.device or "cpu", options.threads, options.name)
        comment = f"Measured by `{COMMAND} --profile` on {values['name']}."
        write_yaml(options.profile, values, comment)
        typer.echo("\n".join(_format_values(values)))
    if options.plot is not None:
        from dist_int8.profiling.timeline import plot

        with tempfile.TemporaryDirectory() as folder:
            trace = options.trace
            if trace is None:
                trace = Path(folder) / "trace.json"
                _trace_short_run(options.model, options.stages or 2, trace)
            typer.echo(plot(trace, options.plot))


def _check_flags(options: BenchOptions) -> None:
    for key, needed in _NEEDS.items():
        if getattr(options, key) is not None and getattr(options, needed) is None:
            raise ValueError(
                f"{COMMAND}:{needed}: --{needed} must be given with --{key}, got none; add "
                f"--{needed} {_EXAMPLES[needed]}"
            )
    if options.profile is None and options.plot is None:
        raise ValueError(
            f"{COMMAND}:profile: --profile or --plot must be given, got neither; add "
            "--profile my-cpu.yaml or --plot timeline.png"
        )
    for key in ("model", "stages"):
        if options.trace is not None and getattr(options, key) is not None:
            raise ValueError(
                f"{COMMAND}:{key}: --{key} must be left out with --trace, got both; keep one"
            )
    check_target(COMMAND, "profile", options.profile)
    check_picture(COMMAND, "plot", options.plot)
    if options.trace is not None and not options.trace.is_file():
        raise ValueError(
            f"{options.trace}: trace must be a file of dist-int8 generate --trace, got no such "
            "file; check the path"
        )


def _format_values(values: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}"
        for key, value in values.items()
    ]


def _trace_short_run(model: str | None, num_stages: int, trace: Path) -> None:
    """Runs a few arbitrary prompts through the pipeline and saves when each stage did what."""
    from dist_int8.api.load import load
    from dist_int8.cli.demo_model import demo_model

    with load(
        model or demo_model(),
        devices=["cpu"] * num_stages,
        threads_per_stage=1,
        max_sequences=NUM_SEQUENCES,
        max_tokens=NUM_PROMPT_TOKENS + NUM_NEW_TOKENS,
        progress=False,
    ) as loaded:
        prompts = [[1 + i] * NUM_PROMPT_TOKENS for i in range(NUM_SEQUENCES)]
        # the first call of a process is slower
        loaded.generate(prompts, max_new_tokens=2, model_defaults=False)
        warm = loaded.trace.last_step
        loaded.generate(prompts, max_new_tokens=NUM_NEW_TOKENS, model_defaults=False)
        loaded.trace.save(trace, since=warm)
