"""load(): from settings through placement, plan and ranks to a handle that generates."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from dist_int8.api.idle_settings import Facts, check_skipped, describe_idle, find_idle
from dist_int8.api.model import Model
from dist_int8.api.placement import Placement, divide_cores, find_placement, share_cores
from dist_int8.api.prepare import Prepared, prepare
from dist_int8.api.stages import build_stage
from dist_int8.config import Settings, load_settings
from dist_int8.config.log_level import read_log_level
from dist_int8.distributed import rendezvous, spawn
from dist_int8.distributed import world as worlds
from dist_int8.distributed.logs import RankLogger
from dist_int8.distributed.states import State
from dist_int8.distributed.world import World
from dist_int8.engine import Engine, EngineConfig
from dist_int8.errors import RankError
from dist_int8.partition import Plan, StagePlan
from dist_int8.pipeline.in_process import InProcessTransport, connect
from dist_int8.pipeline.recovery import Links, Recovery, serve_until_shutdown
from dist_int8.pipeline.runner import Pipeline, serve
from dist_int8.pipeline.stage import Stage
from dist_int8.pipeline.transport import Transport

LOAD_TIMEOUT_S = 3600.0
# A chunk with fewer prompt tokens takes as long as one of this size: on GPUs because reading the
# weights bounds it (below about 150 rows on an A100, 200 on an H200, by datasheet rates), on CPUs
# because the tiles of the kernels are not full.
SMALLEST_CHUNK = {"cpu": 64, "cuda": 256}


def load(
    model: str | Path | None = None,
    *,
    gpus: int | None = None,
    devices: list[str | torch.device] | None = None,
    stages: int | list[int] | None = None,
    config: str | Path | None = None,
    progress: bool = True,
    on_plan: Callable[[Plan], None] | None = None,
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
    check_skipped(prepared.settings, prepared.spec)
    _note_idle(settings, prepared)
    if placement.rank == 0 and on_plan is not None:
        on_plan(prepared.plan)
    cores = share_cores(prepared.settings, placement)
    world = _join_ranks(prepared, cores)
    with _failures_reported(world, placement):
        began = time.monotonic()
        stage = build_stage(prepared, placement.rank, progress)
        _log_stage(prepared.plan.stages[placement.rank], time.monotonic() - began)
        if placement.rank:
            serve_until_shutdown(stage, _links(world, prepared), prepared.settings.recover)
            raise SystemExit(0)
        return _make_handle(prepared, world, stage, cores, progress)


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


def _join_ranks(prepared: Prepared, cores: frozenset[int]) -> World:
    """Meets the other ranks, and starts them unless a launcher has."""
    settings, placement, plan = prepared.settings, prepared.placement, prepared.plan
    if placement.launched is not None:
        return rendezvous.join(
            placement.launched,
            placement.uses_nccl,
            settings.rendezvous_timeout,
            cores,
            settings.interface,
            settings.step_timeout,
        )
    if len(plan.stages) == 1 or settings.in_process:
        return worlds.alone(settings.step_timeout)
    return spawn.spawn(
        len(plan.stages),
        _dump_settings(prepared),
        placement.uses_nccl,
        settings.rendezvous_timeout,
        cores,
        settings.step_timeout,
    )


def _dump_settings(prepared: Prepared) -> dict[str, Any]:
    """The arguments of load() for the ranks that are started here."""
    values = prepared.settings.model_dump(mode="json", exclude={"gpus", "stages"})
    values |= {"model": str(prepared.folder.resolve()), "revision": None}
    values |= {"devices": prepared.placement.devices}
    # the cut of rank 0, whatever the others can see of the devices
    return values | {"stages": [len(stage.blocks) for stage in prepared.plan.stages]}


def _links(world: World, prepared: Prepared) -> Links:
    device = torch.device(prepared.placement.devices[prepared.placement.rank])
    return Links(
        world,
        connect=lambda: Transport(world, prepared.limits, prepared.dtype, device),
        uses_nccl=prepared.placement.uses_nccl,
        rendezvous_timeout_s=prepared.settings.rendezvous_timeout,
        load_timeout_s=LOAD_TIMEOUT_S,
    )


def _make_handle(
    prepared: Prepared, world: World, stage: Stage, cores: frozenset[int], progress: bool
) -> Model:
    """Connects stage 0 to the others; returns the handle of rank 0."""
    settings, plan = prepared.settings, prepared.plan
    num_stages = len(plan.stages)
    links = _links(world, prepared)
    transport: Transport | InProcessTransport | None = None
    if settings.in_process and num_stages > 1:
        others = [build_stage(prepared, rank, progress) for rank in range(1, num_stages)]
        transport = _start_threads([stage, *others], plan, len(cores))
    elif num_stages > 1:
        try:
            transport = links.connect()
        except RankError as error:
            raise world.find_cause(error) from None
        world.wait_for(State.READY, LOAD_TIMEOUT_S)
    recovery = Recovery(links, settings.max_recoveries) if settings.recover else None
    engine = Engine(
        Pipeline(stage, world, transport),
        prepared.limits,
        _configure_engine(prepared),
        restore=recovery.restore if recovery else None,
    )
    return Model(
        engine=engine, plan=plan, settings=settings, folder=prepared.folder, spec=prepared.spec
    )


def _configure_engine(prepared: Prepared) -> EngineConfig:
    settings, num_stages = prepared.settings, len(prepared.plan.stages)
    device = torch.device(prepared.plan.stages[0].device)
    return EngineConfig(
        num_stages=num_stages,
        num_micro_batches=settings.micro_batches or num_stages,
        prefill_chunk=settings.prefill_chunk,
        smallest_chunk=SMALLEST_CHUNK[device.type],
        max_queue=settings.max_queue,
        eos_token_ids=prepared.eos_token_ids,
    )


def _start_threads(stages: list[Stage], plan: Plan, num_threads: int) -> InProcessTransport:
    """Runs every stage but the first in a thread, on cores next to those of the first."""
    return connect(
        [torch.device(place.device) for place in plan.stages],
        lambda rank, links: serve(stages[rank], links, World(rank, len(stages))),
        divide_cores(len(stages), num_threads),
    )


@contextmanager
def _failures_reported(world: World, placement: Placement) -> Iterator[None]:
    """Tells the other ranks what fails here; a rank above 0 then ends."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        state = State.LOST if isinstance(error, RankError) else State.FAILED
        world.report(state, " ".join(str(error).split()) or type(error).__name__)
        if placement.rank:
            _leave(error, placement.rank)
        world.kill()
        raise


def _log_stage(stage: StagePlan, seconds: float) -> None:
    RankLogger(__name__, stage.rank).info(
        "built the stage: blocks %d-%d on %s in %.1f s",
        stage.first_block,
        stage.last_block,
        stage.device,
        seconds,
    )


def _leave(error: BaseException, rank: int) -> NoReturn:
    """Ends a rank above 0 that failed, in one line, without waiting for peers that may be gone."""
    name = "" if isinstance(error, (ValueError, RankError)) else type(error).__name__ + ": "
    RankLogger(__name__, rank).error("%s%s", name, error)
    os._exit(1)
