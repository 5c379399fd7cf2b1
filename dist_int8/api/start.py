"""Starts a model: joins the ranks, builds this rank's stage, and makes the handle on rank 0."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NoReturn

import torch

from dist_int8.api.cores import divide_cores, share_cores
from dist_int8.api.model import Model
from dist_int8.api.prepare import Prepared
from dist_int8.api.stages import build_stage
from dist_int8.distributed import rendezvous, spawn
from dist_int8.distributed import world as worlds
from dist_int8.distributed.diagnosis import find_original
from dist_int8.distributed.logs import RankLogger
from dist_int8.distributed.states import State, StateReport
from dist_int8.distributed.world import World
from dist_int8.engine import Engine, EngineConfig
from dist_int8.engine.driver import forget_frames
from dist_int8.errors import RankError
from dist_int8.partition import Plan, StagePlan
from dist_int8.pipeline.in_process import InProcessTransport, connect
from dist_int8.pipeline.recovery import Links, Recovery, serve_until_shutdown
from dist_int8.pipeline.runner import Pipeline, serve
from dist_int8.pipeline.stage import Stage, end_idle_threads, keep_num_threads
from dist_int8.pipeline.transport import Transport

LOAD_TIMEOUT_S = 3600.0
BAD_INPUT = 2  # exit status of a rank, as of the command line
# A chunk with fewer prompt tokens takes as long as one of this size: on GPUs because reading the
# weights bounds it (below about 150 rows on an A100, 200 on an H200, by datasheet rates), on CPUs
# because the tiles of the kernels are not full.
SMALLEST_CHUNK = {"cpu": 64, "cuda": 256}


def start(prepared: Prepared, announce: Callable[[], None], progress: bool) -> Model:
    """Starts a model; rank 0 gets the handle, the others serve their stage and leave.

    Args:
        prepared: what its stages are built from.
        announce: called before weights are read; what it refuses, the other ranks hear of.
        progress: show a progress bar.

    Raises:
        ValueError: the checkpoint is damaged, on whichever rank.
        RankError: another rank failed or never joined.
    """
    handled = sys.exc_info()[1]
    try:
        with _torch_as_it_was():
            model = _start(prepared, announce, progress)
        _free_importing_frames()
        return model
    except BaseException as error:
        forget_frames(error, handled)  # whoever keeps it must not keep the weights that were read
        if isinstance(error, RankError):
            raise find_original(error) from None
        raise


@cache
def _free_importing_frames() -> None:
    """Frees the frames under which torch was imported, once per process.

    `torch.fx` leaves its frame in a reference cycle, and with it every frame below: those of load()
    have the weights, that of the caller has the handle.
    """
    gc.collect()


def _start(prepared: Prepared, announce: Callable[[], None], progress: bool) -> Model:
    """Joins the ranks and builds the stage of this one, which it serves unless it is rank 0."""
    rank, world = prepared.placement.rank, None
    if prepared.placement.launched is None:
        announce()
    cores = share_cores(prepared.settings, prepared.placement)
    try:
        world = _join_ranks(prepared, cores)
        if prepared.placement.launched is not None:
            announce()
        began = time.monotonic()
        stage = build_stage(prepared, rank, progress)
        _log_stage(prepared.plan.stages[rank], time.monotonic() - began)
        if rank:
            serve_until_shutdown(stage, _links(world, prepared), prepared.settings.recover)
            raise SystemExit(0)
        return _make_handle(prepared, world, stage, cores, progress)
    except SystemExit:
        if world is not None and not rank:  # a signal handler of the session raised it
            _finish(world.kill)
        raise
    except BaseException as error:
        if world is not None:
            _report_failure(error, world, rank)
        raise


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
        settings.interface,
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
    pipeline = Pipeline(stage, world, transport=None)
    try:
        if settings.in_process and num_stages > 1:
            others = [build_stage(prepared, rank, progress) for rank in range(1, num_stages)]
            pipeline.transport = _start_threads([stage, *others], plan, len(cores))
        elif num_stages > 1:
            pipeline.transport = _connect(links)
            world.wait_for(State.READY, LOAD_TIMEOUT_S)
        recovery = Recovery(links, settings.max_recoveries) if settings.recover else None
        engine = Engine(
            pipeline,
            prepared.limits,
            _configure_engine(prepared),
            restore=recovery.restore if recovery else None,
            begin=partial(_begin_driving, stage.device, torch.get_num_threads()),
        )
        return Model(
            engine=engine,
            plan=plan,
            settings=settings,
            encoder=prepared.encoder,
            spec=prepared.spec,
        )
    except BaseException:
        _finish(pipeline.kill)
        raise


def _connect(links: Links) -> Transport:
    try:
        return links.connect()
    except RankError as error:
        raise links.world.find_cause(error) from None


def _begin_driving(device: torch.device, num_threads: int) -> None:
    """Gives the thread that runs stage 0 what the one that loaded it had."""
    keep_num_threads(num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)  # the weights were written on a stream of another thread


def _configure_engine(prepared: Prepared) -> EngineConfig:
    settings, num_stages = prepared.settings, len(prepared.plan.stages)
    device = torch.device(prepared.plan.stages[0].device)
    return EngineConfig(
        num_stages=num_stages,
        num_micro_batches=settings.micro_batches or num_stages,
        prefill_chunk=settings.prefill_chunk,
        smallest_chunk=SMALLEST_CHUNK[device.type],
        max_queue=settings.max_queue,
        eos_token_ids=prepared.encoder.eos_token_ids,
        runs_ahead=num_stages == 1 and device.type == "cuda",
    )


def _start_threads(stages: list[Stage], plan: Plan, num_threads: int) -> InProcessTransport:
    """Runs every stage but the first in a thread, on cores next to those of the first."""
    return connect(
        [torch.device(place.device) for place in plan.stages],
        lambda rank, links: serve(stages[rank], links, World(rank, len(stages))),
        divide_cores(len(stages), num_threads),
    )


@contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """Gives the caller its number of threads and its GPU back; the stages have their own."""
    num_threads = torch.get_num_threads()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        end_idle_threads()
        if torch.cuda.is_initialized():
            torch.cuda.set_device(gpu)


def _report_failure(error: BaseException, world: World, rank: int) -> None:
    """Tells the other ranks what failed here; a rank above 0 then ends."""
    if rank:
        world.report_error(error)
        _leave(error, rank)
    _finish(world.kill)


def _finish(undo: Callable[[], None]) -> None:
    """Runs it to its end, even if Ctrl-C is pressed once more."""
    thread = threading.Thread(target=undo, name="dist_int8 undo")
    thread.start()
    thread.join()


def _log_stage(stage: StagePlan, seconds: float) -> None:
    RankLogger(__name__, stage.rank).info(
        "built the stage: blocks %d-%d on %s in %.1f s",
        stage.first_block,
        stage.last_block,
        stage.device,
        seconds,
    )


def _leave(error: BaseException, rank: int) -> NoReturn:
    """Ends a rank above 0 that failed, in one line, without waiting for peers that may be gone.

    Where rank 0 started it, rank 0 raises the same; where a launcher did, this line may be all that
    is seen, since the launcher then ends rank 0. Ctrl-C went to rank 0 too, and needs no words.
    """
    if isinstance(error, KeyboardInterrupt):
        os._exit(128 + signal.SIGINT)
    level = logging.INFO if spawn.is_spawned() else logging.ERROR
    RankLogger(__name__, rank).log(level, "%s", StateReport.of_error(error).reason)
    os._exit(BAD_INPUT if isinstance(error, ValueError) else 1)
