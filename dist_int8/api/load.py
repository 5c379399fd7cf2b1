"""load(): from settings through placement, plan and ranks to a handle that generates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_int8.api.idle_settings import Facts, describe_idle, find_idle
from dist_int8.api.model import Model
from dist_int8.api.placement import find_placement
from dist_int8.api.prepare import Prepared, prepare
from dist_int8.api.prompts import PromptEncoder
from dist_int8.api.start import start
from dist_int8.config import Settings, load_settings
from dist_int8.config.log_level import read_log_level
from dist_int8.distributed.logs import RankLogger
from dist_int8.partition import Plan


def load(
    model: str | Path | None = None,
    *,
    gpus: int | None = None,
    devices: list[str | torch.device] | None = None,
    stages: int | list[int] | None = None,
    config: str | Path | None = None,
    progress: bool = True,
    on_plan: Callable[[Plan], None] | None = None,
    on_encoder: Callable[[PromptEncoder], None] | None = None,
    **overrides: Any,
) -> Model:
    """Loads a model as a pipeline of int8 stages and returns its handle.

    In a plain Python session the other ranks are started here and end with the handle. Under a
    launcher (deepspeed, torchrun, srun, dist-int8 launch) every rank calls this: rank 0 gets the
    handle, the others serve their stage and leave with SystemExit once rank 0 shuts down.

    Args:
        model: folder of a transformers checkpoint, or a hub id.
        gpus: number of GPUs, cuda:0 .. cuda:gpus-1, with one stage each.
        devices: the device of every stage instead, for example ["cpu", "cpu"]; strings or
            torch.device.
        stages: number of stages, or the number of blocks of each.
        config: YAML file of settings; arguments here win over it.
        progress: show a progress bar while loading.
        on_plan: called on rank 0 with the plan before any weight is read.
        on_encoder: called on rank 0 before any weight is read, with what turns prompts into
            requests, so that prompts can be checked first.
        **overrides: any other field of `Settings` (max_tokens, dtype, outlier_rule, ...); dtype
            may be a torch.dtype.

    Raises:
        ValueError: bad settings, an unknown model, a damaged checkpoint, or a plan that does not
            fit; the message says what to change.
        RankError: another rank failed or never joined.
    """
    read_log_level()  # a wrong one is refused here, not by each rank that is started
    settings = load_settings(
        config,
        model=None if model is None else str(model),
        gpus=gpus,
        devices=_as_setting(devices),
        stages=stages,
        **{name: _as_setting(value) for name, value in overrides.items()},
    )
    if settings.model is None:
        raise ValueError("load(): model must be a folder or a hub id, got nothing; name the model")
    placement = find_placement(settings)
    prepared = prepare(settings, placement)
    _note_idle(settings, prepared)
    return start(prepared, partial(_announce, prepared, on_encoder, on_plan), progress)


def _announce(
    prepared: Prepared,
    on_encoder: Callable[[PromptEncoder], None] | None,
    on_plan: Callable[[Plan], None] | None,
) -> None:
    """Tells the caller of load(), on rank 0, what is known before weights are read."""
    if prepared.placement.rank == 0:
        if on_encoder is not None:
            on_encoder(prepared.encoder)
        if on_plan is not None:
            on_plan(prepared.plan)


def _note_idle(settings: Settings, prepared: Prepared) -> None:
    """Logs, on rank 0 and once, which of the settings that were given change nothing here."""
    placement = prepared.placement
    if placement.rank:
        return
    facts = Facts(
        num_stages=len(prepared.plan.stages),
        devices=tuple(placement.devices),
        is_folder=Path(settings.model or "").is_dir(),
        launched=placement.launched is not None,
        used=prepared.settings,
    )
    if idle := find_idle(settings, facts):
        RankLogger(__name__, 0).warning(describe_idle(idle))


def _as_setting(value: Any) -> Any:
    """Replaces torch.dtype and torch.device by their names, also in a list."""
    if isinstance(value, list | tuple):
        return [_as_setting(item) for item in value]
    is_of_torch = isinstance(value, torch.dtype | torch.device)
    return str(value).removeprefix("torch.") if is_of_torch else value
