"""`dist-int8 generate`: answers one prompt, a few, or a file of them."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_int8.cli.exit_codes import FAILED
from dist_int8.cli.options import (
    Given,
    config_flag,
    device_flag,
    log_flags,
    option,
    setting_flag,
    settings_flags,
    takes,
)
from dist_int8.cli.stdin import read_stdin, read_text
from dist_int8.cli.stdout import take_stdout
from dist_int8.cli.talk import Talk
from dist_int8.cli.targets import check_target
from dist_int8.config import Settings

COMMAND = "dist-int8 generate"
WHAT, LAYOUT, RUNTIME, SAMPLING, OUTPUT = PANELS = (
    "What to answer",
    "Where it runs",
    "How it runs",
    "How tokens are chosen",
    "What is shown",
)


@dataclass(frozen=True)
class GenerateOptions:
    """Options of `generate` alone."""

    prompt: Annotated[
        list[str] | None,
        option(WHAT, "A prompt; repeat it for a batch. - reads it from stdin.", "--prompt", "-p"),
    ] = None
    input: Annotated[
        Path | None,
        option(
            WHAT,
            "File of prompts as JSON lines, - for stdin: prompt, token_ids or messages, and "
            "optionally an id and settings of that line such as max_new_tokens, temperature, seed "
            "and stop.",
        ),
    ] = None
    chat: Annotated[
        bool, option(WHAT, "Put each prompt into the model's chat template.", "--chat")
    ] = False
    system: Annotated[
        str | None,
        option(WHAT, "System message in front of each prompt; with it --chat is implied."),
    ] = None
    output: Annotated[
        Path | None,
        option(
            OUTPUT,
            "File for the answers to --input, one JSON line each as they finish; after a kill, the "
            "same command continues it.",
        ),
    ] = None
    trace: Annotated[
        Path | None,
        option(
            OUTPUT, "File for when each stage ran what, for Perfetto or dist-int8 bench --plot."
        ),
    ] = None
    json: Annotated[
        bool,
        option(
            OUTPUT,
            "Print only JSON on stdout: one object per prompt, or with --input one of figures.",
            "--json",
        ),
    ] = False
    show_schedule: Annotated[
        bool,
        option(
            OUTPUT,
            "Draw which stage runs which micro-batch when, in the first decode steps.",
            "--show-schedule",
        ),
    ] = False
    stream: Annotated[
        bool,
        option(
            OUTPUT,
            "Print the text token by token, or all of it at the end. (default: --stream)",
            "--stream/--no-stream",
        ),
    ] = True


@takes(
    GenerateOptions,
    [
        *settings_flags(WHAT, "model", "revision", "allow_pickle", "random_weights"),
        config_flag(WHAT),
        device_flag(LAYOUT),
        *settings_flags(LAYOUT, "stages", "gpus", "devices"),
        *settings_flags(RUNTIME, "micro_batches", "threads_per_stage", "dtype", "int8"),
        *settings_flags(RUNTIME, "cuda_graphs"),
        *settings_flags(RUNTIME, "accuracy", "rotation", "outlier_rule", "outlier_threshold"),
        *settings_flags(RUNTIME, "max_sequences"),
        *settings_flags(RUNTIME, "calibrate", "num_hot_columns", "head", "embedding", "kv"),
        *settings_flags(RUNTIME, "max_tokens"),
        *settings_flags(SAMPLING, "max_new_tokens", "min_new_tokens", "max_time"),
        *settings_flags(SAMPLING, "temperature", "top_k", "top_p", "min_p"),
        *settings_flags(SAMPLING, "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *settings_flags(SAMPLING, "no_repeat_ngram_size", "seed", "stop"),
        setting_flag(SAMPLING, "stop_token_ids", "--stop-token-id", kind=list[int]),
        *settings_flags(SAMPLING, "ignore_eos", "model_defaults"),
        *log_flags(OUTPUT, "Print only the text: no plan, no progress, no figures."),
    ],
    PANELS,
)
def generate(options: GenerateOptions, given: Given) -> None:
    """Answer prompts. The text goes to stdout; plan, progress and figures go to stderr.

    Two stages on the CPU:

        dist-int8 generate -m ./smollm2 --device cpu --stages 2 -p "Hello"

    Sampling, with a seed that gives the same answer again:

        dist-int8 generate -m ./smollm2 -p "Once" --temperature 0.8 --seed 1

    A batch, as JSON lines:

        dist-int8 generate -m ./smollm2 -p "One" -p "Two" --json

    A file of settings, and the prompt as a chat message, after one of the system:

        dist-int8 generate --config configs/cpu-2-stages.yaml --system "Be brief." -p "Hi!"

    A text from a pipe:

        cat notes.txt | dist-int8 generate -m ./smollm2 --chat -p -

    A file of prompts; a line that cannot be answered gets an error in its place, and exit code 1:

        dist-int8 generate -m ./smollm2 --stages 2 --input prompts.jsonl --output answers.jsonl
    """
    generation = given.check_generation(COMMAND)
    settings = given.load_settings(COMMAND)
    if settings.model is None:
        raise ValueError(
            f"{COMMAND}:model: model must be a folder or a hub id, got none; give --model, or "
            'try --model "$(dist-int8 demo-model)"'
        )
    _check_files(options)
    talk = Talk(options.chat or options.system is not None, options.system)
    prompts, items = options.prompt or [], None
    if os.environ.get("RANK", "0") == "0":  # stdin and the file are rank 0's
        prompts = _read_prompts(prompts)
        if options.input is not None:
            items = _read_items(
                options.input, given, {**asdict(talk), **_select_numerics(settings)}
            )
    with take_stdout() as stdout:
        from dist_int8.cli.answers import Display, answer
        from dist_int8.cli.batch import answer_file

        display = Display(
            as_json=options.json,
            show_schedule=options.show_schedule,
            stream=options.stream and not options.json,
            quiet=given.quiet or options.json,
            trace=options.trace,
        )
        if options.output is None:
            answer(settings, generation, prompts, talk, display, stdout)
        elif not answer_file(settings, items or [], options.output, talk, display, stdout):
            raise typer.Exit(FAILED)


def _read_prompts(prompts: list[str]) -> list[str]:
    """Reads stdin in place of a prompt `-`."""
    if prompts.count("-") > 1:
        raise ValueError(
            f"{COMMAND}:prompt: --prompt - must be given once, got it {prompts.count('-')} times; "
            "stdin can be read once"
        )
    return [
        read_text(f"{COMMAND}:prompt", "--prompt") if prompt == "-" else prompt
        for prompt in prompts
    ]


def _read_items(path: Path, given: Given, decisive: dict[str, Any]) -> list[Any]:
    """Reads the prompts of a file, or of stdin; `decisive` is what else decides the answers."""
    from dist_int8.cli.prompt_file import read_items

    content = read_stdin(f"{COMMAND}:input", "--input") if str(path) == "-" else None
    return read_items(path, given.generation, decisive, content)


def _check_files(options: GenerateOptions) -> None:
    """Checks that prompts come from one place, answers go to one, and a trace can be written."""
    if options.input is None and not options.prompt:
        raise ValueError(f'{COMMAND}:prompt: prompt must be given, got none; add --prompt "..."')
    if options.input is not None and options.prompt:
        raise ValueError(
            f"{COMMAND}:prompt: --prompt must be left out with --input, got both; keep one"
        )
    if (options.input is None) != (options.output is None):
        raise ValueError(
            f"{COMMAND}:output: --input and --output must be given together, got one; add "
            + ("--input prompts.jsonl" if options.input is None else "--output answers.jsonl")
        )
    if options.input is not None and options.show_schedule:
        raise ValueError(
            f"{COMMAND}:show_schedule: --show-schedule must be left out with --input, got both; "
            "use --trace, which has the times"
        )
    if str(options.output) == "-":
        raise ValueError(
            f"{COMMAND}:output: --output must be a file, which a later run can continue, got '-'; "
            "name a file, or give each prompt with --prompt to have the answers on stdout"
        )
    check_target(COMMAND, "trace", options.trace)
    check_target(COMMAND, "output", options.output)
    if options.output is not None and options.input is not None:
        _check_distinct(options.input, options.output)


def _check_distinct(prompts: Path, answers: Path) -> None:
    """Refuses answers in the file of the prompts, and in what is no file that keeps them."""
    if answers.exists() and prompts.exists() and answers.samefile(prompts):
        raise ValueError(
            f"{COMMAND}:output: --output must be another file than --input, got {str(answers)!r} "
            "for both; name a new file for the answers"
        )
    if prompts.is_char_device():  # /dev/zero has no end
        raise ValueError(
            f"{COMMAND}:input: --input must be a file or a pipe, got the device {str(prompts)!r}; "
            "check the path"
        )
    if answers.exists() and not answers.is_file():
        raise ValueError(
            f"{COMMAND}:output: --output must be an ordinary file, which a later run can continue, "
            f"got {str(answers)!r}; name a file"
        )


def _select_numerics(settings: Settings) -> dict[str, Any]:
    """Selects the settings that decide tokens, which exclude where and how the model runs."""
    numbers = ("revision", "random_weights", "dtype", "int8", "accuracy", "rotation")
    formats = ("outlier_rule", "outlier_threshold", "num_hot_columns", "skipped", "embedding")
    keys = (*numbers, *formats, "calibrate", "kv", "max_tokens")
    values = {key: getattr(settings, key) for key in keys}
    folder = Path(settings.model or "")
    return {**values, "model": str(folder.resolve()) if folder.is_dir() else settings.model}
