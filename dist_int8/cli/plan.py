"""The command line of planning: `dist-int8 plan`.

A plan is exit code 0 if the model fits and 2 if it does not; bad input is 1, so that a script can
tell the two apart (`cli.run` sees to the 1).
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_int8.config import (
    Settings,
    find_shipped,
    load_settings,
    parse_byte_size,
    write_yaml,
)

DOES_NOT_FIT = 2
_WHAT, _LAYOUT, _ASKED, _OUTPUT = "What to plan", "Where it runs", "What is asked", "What is shown"
_SOURCE = "dist-int8 plan"


def _option(group: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=group, show_default=False)


def plan(
    model: Annotated[
        str | None,
        _option(
            _WHAT,
            "A model folder, a folder of shapes such as configs/models/bloom-176b (only its "
            "config.json is read), or a hub id.",
            "--model",
            "-m",
        ),
    ] = None,
    config: Annotated[
        Path | None, _option(_WHAT, "YAML file of settings; flags win over it. See configs/.")
    ] = None,
    gpus: Annotated[int | None, _option(_LAYOUT, "Number of GPUs; they need not exist.")] = None,
    devices: Annotated[
        str | None, _option(_LAYOUT, "Devices instead, as in cuda:0,cuda:1 or cpu,cpu.")
    ] = None,
    memory: Annotated[
        str | None,
        _option(_LAYOUT, "Budget of each device, as in 80GB, or of every one: 80GB,40GB."),
    ] = None,
    stages: Annotated[
        str | None,
        _option(_LAYOUT, "A number, `auto` (devices may stay unused), or 17,18,18,17 blocks."),
    ] = None,
    profile: Annotated[
        str | None,
        _option(
            _LAYOUT,
            "How fast devices are: t4, v100, a10, a100-40, a100-80, l4, l40s, h100, h200, cpu, or "
            "a file of `dist-int8 bench --profile`; one, or one a device. (default: a100-80)",
        ),
    ] = None,
    hosts: Annotated[
        str | None, _option(_LAYOUT, "Machines that the devices are spread over, as in a,b.")
    ] = None,
    objective: Annotated[
        str | None, _option(_ASKED, "throughput, latency or max_kv_tokens. (default: throughput)")
    ] = None,
    prefill_ratio: Annotated[
        float | None,
        _option(
            _ASKED, "Prompt tokens for every generated one, which throughput counts. (default: 1)"
        ),
    ] = None,
    sequences: Annotated[
        int | None, _option(_ASKED, "Sequences in flight; without it as many as fit.")
    ] = None,
    context: Annotated[
        int | None, _option(_ASKED, "Tokens of a sequence; without it up to 2048 as fit.")
    ] = None,
    prefill_chunk: Annotated[
        int | None, _option(_ASKED, "Prompt tokens of a micro-batch. (default: 512)")
    ] = None,
    micro_batches: Annotated[
        int | None, _option(_ASKED, "Micro-batches in flight. (default: one a stage)")
    ] = None,
    reserve: Annotated[
        str | None,
        _option(_ASKED, "Left alone of each budget. (default: 256MiB on cuda, 0 on cpu)"),
    ] = None,
    head: Annotated[str | None, _option(_ASKED, "int8 or 16bit. (default: 16bit)")] = None,
    embedding: Annotated[
        str | None,
        _option(_ASKED, "int8 or 16bit. (default: 16bit)"),
    ] = None,
    kv: Annotated[
        str | None, _option(_ASKED, "KV cache in int8 or 16bit. (default: 16bit)")
    ] = None,
    hot_columns: Annotated[
        int | None,
        _option(
            _ASKED,
            "Input features of each linear that keep 16 bits: 0 or a multiple of 16. (default: as "
            "the settings calibrate)",
        ),
    ] = None,
    dtype: Annotated[str | None, _option(_ASKED, "As in the settings. (default: auto)")] = None,
    as_json: Annotated[
        bool, _option(_OUTPUT, "One JSON object on stdout, nothing else.", "--json")
    ] = False,
    save: Annotated[
        Path | None, _option(_OUTPUT, "Write the plan as YAML that load(config=) accepts.")
    ] = None,
) -> None:
    """Say whether a model fits, how it is cut, and how fast it would be; no weights, no GPU.

    Exit code 0: it fits; 2: it does not, with what would; 1: bad input.

        dist-int8 plan --model configs/models/bloom-176b --gpus 4 --memory 80GB
        dist-int8 plan -m configs/models/llama-3-70b --gpus 2 --memory 40GB --profile a100-40 --json
        dist-int8 plan --config configs/bloom-176b-4xa100-80gb.yaml --save plan.yaml
    """
    if hot_columns is not None and (hot_columns < 0 or hot_columns % 16):
        raise ValueError(
            f"{_SOURCE}:hot_columns: hot_columns must be 0 or a multiple of 16, got "
            f"{hot_columns}; write --hot-columns 16"
        )
    settings = _settings(
        config,
        memory,
        model=model,
        gpus=gpus,
        devices=devices.split(",") if devices is not None else None,
        stages=_stages(stages),
        profile=profile.split(",") if profile is not None else None,
        hosts=hosts.split(",") if hosts is not None else None,
        objective=objective,
        prefill_ratio=prefill_ratio,
        prefill_chunk=prefill_chunk,
        micro_batches=micro_batches,
        reserve=_reserve(reserve),
        dtype=dtype,
        head=head,
        embedding=embedding,
        kv=kv,
        num_hot_columns=hot_columns,
        calibrate="random" if hot_columns else None,
    )
    if settings.model is None:
        raise ValueError(
            f"{_SOURCE}:model: model must be a folder with a config.json or a hub id, got none; "
            "give --model, as in --model configs/models/bloom-176b"
        )
    from dist_int8.models import describe, load_config
    from dist_int8.partition.from_settings import Asked, answer, saved

    asked = Asked(
        num_sequences=sequences,
        max_tokens=context,
        like_load=config is not None,
        choose_count=stages == "auto",
    )
    model_config = load_config(find_shipped(settings.model))
    spec = describe(model_config)
    if hot_columns is not None and hot_columns > spec.hidden_size:
        raise ValueError(
            f"{_SOURCE}:hot_columns: hot_columns must be at most the model's {spec.hidden_size} "
            f"features, got {hot_columns}; 16 is the usual number"
        )
    found = answer(settings, asked, model_config, spec, _SOURCE)
    if as_json:
        typer.echo(json.dumps(found.as_dict(settings.model)))
    else:
        typer.echo(f"{found.table()}\n\n{found.summary()}")
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)
    if save is not None:
        write_yaml(save, saved(settings, asked, found), f"{settings.model}\n\n{found.table()}")


def _settings(config: Path | None, memory: str | None, **given: Any) -> Settings:
    """Settings of file and flags; one memory size is that of every device."""
    if given["gpus"] is None and given["devices"] is None:
        file = load_settings(config, source=_SOURCE)
        if file.gpus is None and file.devices is None:
            raise ValueError(
                f"{_SOURCE}:gpus: gpus must be given, got none; write --gpus 4 or --devices cpu,cpu"
            )
        # any flag of the layout takes the place of all of the file's: hand these on
        given |= {"gpus": file.gpus, "devices": file.devices}
        given["stages"] = given["stages"] or file.stages
    if memory is not None:
        sizes = memory.split(",")
        num_devices = len(given["devices"] or ()) or given["gpus"] or 1
        given["memory"] = sizes * num_devices if len(sizes) == 1 else sizes
    return load_settings(config, source=_SOURCE, **given)


def _stages(text: str | None) -> int | list[int] | None:
    if text is None or text == "auto":
        return None
    try:
        counts = [int(count) for count in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{_SOURCE}:stages: stages must be a number, `auto`, or numbers of blocks, got "
            f"{text!r}; write 4 or 17,18,18,17"
        ) from None
    return counts if len(counts) > 1 else counts[0]


def _reserve(text: str | None) -> int | None:
    if text is None:
        return None
    if text == "0":
        return 0
    try:
        return parse_byte_size(text)
    except ValueError as error:
        raise ValueError(f"{_SOURCE}:reserve: reserve {error}") from None
