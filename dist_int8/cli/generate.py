"""The command line of answers: `dist-int8 generate`, one prompt, a few, or a file of them."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from dist_int8.config import GenerationSettings, Settings, load_settings

COMMAND = "dist-int8 generate"
FAILED = 1

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


def generate(
    prompt: Annotated[
        list[str] | None,
        _option(_WHAT, "A prompt; repeat it for a batch of prompts.", "--prompt", "-p"),
    ] = None,
    input_file: Annotated[
        Path | None,
        _option(
            _WHAT,
            "Prompts instead, as JSON lines: prompt, token_ids or messages, and for that line "
            "alone an id and settings such as max_new_tokens, temperature, seed, stop.",
            "--input",
        ),
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
    max_sequences: Annotated[int | None, _setting(_RUNTIME, "max_sequences")] = None,
    calibrate: Annotated[str | None, _setting(_RUNTIME, "calibrate")] = None,
    num_hot_columns: Annotated[int | None, _setting(_RUNTIME, "num_hot_columns")] = None,
    head: Annotated[str | None, _setting(_RUNTIME, "head")] = None,
    embedding: Annotated[str | None, _setting(_RUNTIME, "embedding")] = None,
    kv: Annotated[str | None, _setting(_RUNTIME, "kv")] = None,
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
    output: Annotated[
        Path | None,
        _option(
            _OUTPUT,
            "Answers to --input, a JSON line each as it is done; run again after a kill to go on.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        _option(_OUTPUT, "Write when each stage ran what, for Perfetto or dist-int8 bench --plot."),
    ] = None,
    as_json: Annotated[
        bool,
        _option(
            _OUTPUT,
            "One JSON object a prompt on stdout, nothing else; with --input one of figures.",
            "--json",
        ),
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

    A file of prompts; a line that cannot be answered gets an error in its place, and exit code 1:

        dist-int8 generate -m ./smollm2 --stages 2 --input prompts.jsonl --output answers.jsonl
    """
    source = COMMAND
    chosen = _given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    generation = GenerationSettings.from_values(chosen, source)
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
        calibrate=calibrate,
        num_hot_columns=num_hot_columns,
        head=head,
        embedding=embedding,
        kv=kv,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
    )
    if settings.model is None:
        raise ValueError(
            f"{source}:model: model must be a folder or a hub id, got none; give --model, or "
            'try --model "$(dist-int8 demo-model)"'
        )
    _check_sources(prompt, input_file, output, show_schedule)
    if trace is not None and (trace.is_dir() or not trace.absolute().parent.is_dir()):
        raise ValueError(
            f"{source}:trace: trace must be a new file in a folder that exists, got {trace}; "
            "check the path"
        )
    items = None
    if input_file is not None and os.environ.get("RANK", "0") == "0":  # the file is rank 0's
        from dist_int8.cli.prompt_file import read_items

        items = read_items(input_file, chosen, {"chat": chat, **_numerics(settings)})
    stdout = _take_stdout()
    from dist_int8.cli.answers import Display, answer, answer_file

    display = Display(as_json, show_schedule, stream and not as_json, quiet or as_json, trace)
    if output is None:
        answer(settings, generation, prompt or [], chat, display, stdout)
    elif not answer_file(settings, items or [], output, chat, display, stdout):
        raise typer.Exit(FAILED)


def _check_sources(
    prompt: list[str] | None, input_file: Path | None, output: Path | None, show_schedule: bool
) -> None:
    if input_file is None and not prompt:
        raise ValueError(f'{COMMAND}:prompt: prompt must be given, got none; add --prompt "..."')
    if input_file is not None and prompt:
        raise ValueError(
            f"{COMMAND}:prompt: --prompt must be left out with --input, got both; keep one"
        )
    if (input_file is None) != (output is None):
        raise ValueError(
            f"{COMMAND}:output: --input and --output must be given together, got one; add "
            + ("--input prompts.jsonl" if input_file is None else "--output answers.jsonl")
        )
    if input_file is not None and show_schedule:
        raise ValueError(
            f"{COMMAND}:show_schedule: --show-schedule must be left out with --input, got both; "
            "--trace has the times"
        )


def _numerics(settings: Settings) -> dict[str, Any]:
    """The settings that decide tokens; where and how it runs does not."""
    numbers = ("revision", "random_weights", "dtype", "int8", "outlier_rule", "outlier_threshold")
    formats = ("skipped", "embedding", "calibrate", "num_hot_columns", "kv")
    values = {key: getattr(settings, key) for key in (*numbers, *formats, "max_tokens")}
    folder = Path(settings.model or "")
    return {**values, "model": str(folder.resolve()) if folder.is_dir() else settings.model}


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
            from dist_int8.partition.gpus import probe

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
