"""`dist-int8 plan`: says whether a model fits, how it is cut and how fast it would be.

The exit code is 0 if the model fits and 2 if it does not; bad input is 1 (`app.run` turns its 2
into that), so that a script can tell the two apart.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_int8.cli.exit_codes import DOES_NOT_FIT
from dist_int8.cli.options import (
    Given,
    config_flag,
    log_flags,
    option,
    setting_flag,
    settings_flags,
    takes,
)
from dist_int8.cli.targets import check_target
from dist_int8.config import MAX_STAGES, Settings, find_shipped, load_settings, write_yaml

COMMAND = "dist-int8 plan"
MAX_COUNT = 2**31 - 1
WHAT, LAYOUT, ASKED, OUTPUT = PANELS = (
    "What to plan",
    "Where it runs",
    "What is asked",
    "What is shown",
)


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan` alone."""

    sequences: Annotated[
        int | None, option(ASKED, "Number of sequences in flight. (default: as many as fit)")
    ] = None
    context: Annotated[
        int | None,
        option(ASKED, "Number of tokens of a sequence. (default: as many as fit, up to 2048)"),
    ] = None
    json: Annotated[bool, option(OUTPUT, "Print one JSON object and nothing else.", "--json")] = (
        False
    )
    save: Annotated[
        Path | None, option(OUTPUT, "File for the plan, as YAML that load(config=) accepts.")
    ] = None


@takes(
    PlanOptions,
    [
        setting_flag(
            WHAT,
            "model",
            text="A model folder, a folder of shapes such as configs/models/bloom-176b (only its "
            "config.json is read), or a hub id.",
        ),
        config_flag(WHAT),
        setting_flag(LAYOUT, "gpus", text="Number of GPUs; they need not exist."),
        setting_flag(
            LAYOUT, "devices", text="Devices instead of --gpus, as in cuda:0,cuda:1 or cpu,cpu."
        ),
        setting_flag(
            LAYOUT,
            "memory",
            text="Memory budget of every device, as in 80GB, or of each one: 80GB,40GB.",
            kind=str,
        ),
        setting_flag(
            LAYOUT,
            "stages",
            text="Number of stages, `auto` (devices may stay unused), or the number of blocks of "
            "each, as in 17,18,18,17. (default: one per device)",
            kind=str,
        ),
        setting_flag(
            LAYOUT,
            "profile",
            text="How fast the devices are: t4, v100, a10, a100-40, a100-80, l4, l40s, h100, h200, "
            "cpu, or a file written by `dist-int8 bench --profile`; one, or one per device. "
            "(default: a100-80)",
        ),
        setting_flag(LAYOUT, "hosts", text="Machines that the devices are spread over, as in a,b."),
        *settings_flags(ASKED, "objective", "prefill_ratio", "prefill_chunk", "micro_batches"),
        setting_flag(ASKED, "reserve", kind=str),
        *settings_flags(ASKED, "head", "embedding", "kv"),
        setting_flag(
            ASKED,
            "num_hot_columns",
            "--hot-columns",
            text="Number of input features of each linear that keep 16 bits: 0 or a multiple of "
            "16. (default: as the settings calibrate)",
        ),
        *settings_flags(ASKED, "accuracy", "rotation", "dtype"),
        *log_flags(OUTPUT, "Log errors only, on stderr."),
    ],
    PANELS,
)
def plan(options: PlanOptions, given: Given) -> None:
    """Say whether a model fits, how it is cut, and how fast it would be; no weights, no GPU.

    Exit code 0: it fits; 2: it does not, with what would; 1: bad input.

        dist-int8 plan --model configs/models/bloom-176b --gpus 4 --memory 80GB
        dist-int8 plan -m configs/models/llama-3-70b --gpus 2 --memory 40GB --profile a100-40 --json
        dist-int8 plan --config configs/bloom-176b-4xa100-80gb.yaml --save plan.yaml
    """
    hot_columns = given.settings.get("num_hot_columns", 0)
    _check_hot_columns(hot_columns)
    _check_counts(options)
    check_target(COMMAND, "save", options.save)
    settings = _load_settings(given)
    if settings.model is None:
        raise ValueError(
            f"{COMMAND}:model: model must be a folder with a config.json or a hub id, got none; "
            "give --model, as in --model configs/models/bloom-176b"
        )
    from dist_int8.models import describe, load_config, resolve_skip
    from dist_int8.partition.from_settings import PlanRequest, answer, export_settings

    request = PlanRequest(
        num_sequences=options.sequences,
        max_tokens=options.context,
        like_load=given.config is not None,
        choose_count=given.settings.get("stages") == "auto",
    )
    model_config = load_config(find_shipped(settings.model))
    spec = describe(model_config)
    skip = resolve_skip(spec, settings.skip_modules, f"{COMMAND}:skip_modules")
    if list(skip) != settings.skip_modules:
        settings = settings.model_copy(update={"skip_modules": list(skip)})
    assert settings.model is not None
    _check_hot_columns(hot_columns, spec.hidden_size)
    found = answer(settings, request, model_config, spec, COMMAND)
    if options.json:
        typer.echo(json.dumps(found.as_dict(settings.model)))
    else:
        typer.echo(f"{found.table()}\n\n{found.summary()}")
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)
    if options.save is not None:
        comment = f"{settings.model}\n\n{found.table()}"
        write_yaml(options.save, export_settings(settings, found), comment)


def _check_counts(options: PlanOptions) -> None:
    for key in ("sequences", "context"):
        value = getattr(options, key)
        if value is not None and not 1 <= value <= MAX_COUNT:
            raise ValueError(
                f"{COMMAND}:{key}: --{key} must be 1 to {MAX_COUNT}, got {value}; leave it out for "
                "as many as fit"
            )


def _check_hot_columns(number: int, num_features: int | None = None) -> None:
    """Checks --hot-columns by itself and, once it is known, against the size of the model."""
    where = f"{COMMAND}:hot_columns: hot_columns must be"
    if number < 0 or number % 16:
        raise ValueError(f"{where} 0 or a multiple of 16, got {number}; write --hot-columns 16")
    if num_features is not None and number > num_features:
        raise ValueError(
            f"{where} at most the model's {num_features} features, got {number}; 16 is the usual "
            "number"
        )


def _load_settings(given: Given) -> Settings:
    """Reads the settings of file and flags; one memory size stands for every device.

    Wrong values come before missing ones: with three of them, none hides another.
    """
    config = given.config
    values = {**given.settings, "stages": _parse_stages(given.settings.get("stages"))}
    if values.get("num_hot_columns"):
        values["calibrate"] = "random"
    if "memory" in values:
        values["memory"] = values["memory"].split(",")
    if values.get("gpus") is None and values.get("devices") is None:
        file = load_settings(config, source=COMMAND)
        if file.gpus is None and file.devices is None:
            _check_rest(given, values)
            raise ValueError(
                f"{COMMAND}:gpus: gpus must be given, got none; write --gpus 4 or --devices cpu,cpu"
            )
        # any flag of the layout replaces all of the file's: pass these on
        values |= {"gpus": file.gpus, "devices": file.devices}
        values["stages"] = values["stages"] or file.stages
    if "memory" in values:
        sizes = values["memory"]
        num_devices = len(values.get("devices") or ()) or values.get("gpus") or 1
        values["memory"] = sizes * num_devices if len(sizes) == 1 else sizes
    return load_settings(config, source=COMMAND, flags=given.flags, **values)


def _check_rest(given: Given, values: Mapping[str, Any]) -> None:
    """Checks everything but the number of devices, which is missing."""
    stages, sizes = values["stages"], values.get("memory")
    count = len(stages) if isinstance(stages, list) else stages or 1
    if sizes is not None and len(sizes) == 1:
        sizes = sizes * max(1, min(count, MAX_STAGES))
    load_settings(given.config, source=COMMAND, flags=given.flags, **{**values, "memory": sizes})


def _parse_stages(stages: Any) -> int | list[int] | None:
    if stages is None or stages == "auto":
        return None
    if isinstance(stages, str):
        raise ValueError(
            f"{COMMAND}:stages: stages must be a number, `auto`, or numbers of blocks, got "
            f"{stages!r}; write 4 or 17,18,18,17"
        )
    return stages
