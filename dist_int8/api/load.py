"""load(): settings -> plan -> ranks -> a handle that generates."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import GenerationConfig

from dist_int8.api.model import Model
from dist_int8.api.stages import as_stored, build_stage, vocab_dtype_of
from dist_int8.checkpoint import resolve_model
from dist_int8.config import Settings, load_settings
from dist_int8.distributed import rendezvous, spawn
from dist_int8.distributed import world as worlds
from dist_int8.distributed.rendezvous import Launched
from dist_int8.distributed.world import World
from dist_int8.engine import Engine
from dist_int8.errors import RankError
from dist_int8.models import ModelSpec, describe, load_config
from dist_int8.partition import Plan, StagePlan, format_bytes
from dist_int8.partition.devices import choose_devices, connects_over_nccl
from dist_int8.partition.from_settings import devices_of, formats_of, free_budgets, plan_of
from dist_int8.pipeline.in_process import InProcessTransport, connect
from dist_int8.pipeline.microbatch import Limits
from dist_int8.pipeline.recovery import Links, Recovery, serve_until_shutdown
from dist_int8.pipeline.runner import Pipeline, serve
from dist_int8.pipeline.stage import Stage
from dist_int8.pipeline.transport import Transport

LOAD_TIMEOUT_S = 3600.0
DEFAULT_MAX_TOKENS = 2048
# A chunk of fewer prompt tokens takes as long as this one: on a GPU below the knee, where reading
# the weights bounds it (about 150 rows on an A100, 200 on an H200, datasheet rates), on CPUs where
# the tiles of the kernels are not full.
SMALLEST_CHUNK = {"cpu": 64, "cuda": 256}


def load(
    model: str | Path | None = None,
    *,
    gpus: int | None = None,
    devices: list[str] | None = None,
    stages: int | None = None,
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
        gpus: use cuda:0 .. cuda:gpus-1, one stage each.
        devices: the device of every stage instead, for example ["cpu", "cpu"].
        stages: number of stages, where neither of the two says it.
        config: YAML file of settings; arguments here win over it.
        progress: show a progress bar while loading.
        on_plan: called on rank 0 with the plan before any weight is read.
        **overrides: any other field of `Settings` (max_tokens, dtype, outlier_rule, ...).

    Raises:
        ValueError: bad settings, an unknown model, a damaged checkpoint, or a plan that does not
            fit; the message says what to change.
        RankError: another rank failed or never joined.
    """
    settings = load_settings(
        config,
        model=None if model is None else str(model),
        gpus=gpus,
        devices=devices,
        stages=stages,
        **overrides,
    )
    if settings.model is None:
        raise ValueError("load(): model must be a folder or a hub id, got nothing; name the model")
    place = rendezvous.launched()
    if settings.recover and place is not None and not spawn.is_spawned():
        raise ValueError(
            "load(): recover must be false under a launcher, got true; leave it out, and let the "
            "launcher start all ranks again"
        )
    if settings.in_process and (place is not None or settings.recover):
        raise ValueError(
            "load(): in_process must be false under a launcher and with recover, got true; leave "
            "it out"
        )
    stage_devices = _devices(settings, place)
    hosts = _hosts(settings, place)
    owners = _gpu_owners(place, len(stage_devices)) or hosts
    uses_nccl = connects_over_nccl(settings, stage_devices, owners)
    folder = resolve_model(
        settings.model,
        settings.revision,
        allow_pickle=settings.allow_pickle,
        weights=not settings.random_weights,
    )
    hf_config = load_config(folder)
    spec = describe(hf_config)
    settings, hot = as_stored(settings, folder, spec)
    dtype = _dtype(settings, stage_devices, hf_config)
    vocab_dtype = vocab_dtype_of(settings, folder, spec, hf_config, dtype)
    limits = _limits(settings, spec)
    plan = plan_of(
        settings,
        spec,
        devices_of(
            settings,
            stage_devices,
            # under a launcher each rank would see other numbers, and plan for itself
            budgets=None if place else free_budgets(stage_devices),
            hosts=hosts,
        ),
        replace(
            formats_of(settings, dtype.itemsize, vocab_dtype.itemsize),
            num_hot_columns=hot.num_columns,
            hot_size=hot.element_size,
            head_hot_columns=hot.head_columns,
        ),
        num_sequences=limits.num_slots,
        max_tokens=limits.max_tokens,
    )
    _check_host_memory(plan, place)
    rank = 0 if place is None else place.rank
    if rank == 0 and on_plan is not None:
        on_plan(plan)
    cores = _share_cores(settings, plan, place)
    if place is not None:
        world = rendezvous.join(
            place,
            uses_nccl,
            settings.rendezvous_timeout,
            cores,
            settings.interface,
            settings.step_timeout,
        )
    elif len(plan.stages) == 1 or settings.in_process:
        world = worlds.alone(settings.step_timeout)
    else:
        same = settings.model_dump(mode="json", exclude={"gpus", "stages"})
        same |= {"model": str(folder.resolve()), "devices": stage_devices, "revision": None}
        # the cut of rank 0, whatever the others can see of the devices
        same |= {"stages": [len(stage.blocks) for stage in plan.stages]}
        world = spawn.spawn(
            len(plan.stages),
            same,
            uses_nccl,
            settings.rendezvous_timeout,
            cores,
            settings.step_timeout,
        )
    try:

        def build(place: StagePlan) -> Stage:
            formats = (dtype, vocab_dtype)
            return build_stage(folder, spec, place, plan, settings, limits, *formats, progress, hot)

        stage = build(plan.stages[rank])
        device = torch.device(plan.stages[rank].device)
        links = Links(
            world,
            connect=lambda: Transport(world, limits, dtype, device),
            uses_nccl=uses_nccl,
            rendezvous_timeout_s=settings.rendezvous_timeout,
            load_timeout_s=LOAD_TIMEOUT_S,
        )
        if rank:
            serve_until_shutdown(stage, links, settings.recover)
            raise SystemExit(0)
        transport: Transport | InProcessTransport | None = None
        if settings.in_process:
            transport = _start_threads([stage, *map(build, plan.stages[1:])], plan, cores)
        elif len(plan.stages) > 1:
            try:
                transport = links.connect()
            except RankError as error:
                raise world.blame(error) from None
            world.wait_for("ready", LOAD_TIMEOUT_S)
        recovery = Recovery(links, settings.max_recoveries) if settings.recover else None
        return Model(
            engine=Engine(
                Pipeline(stage, world, transport),
                limits,
                num_stages=len(plan.stages),
                num_micro_batches=settings.micro_batches or len(plan.stages),
                prefill_chunk=settings.prefill_chunk,
                smallest_chunk=SMALLEST_CHUNK[torch.device(stage_devices[0]).type],
                eos_token_ids=_eos_token_ids(folder, hf_config),
                max_queue=settings.max_queue,
                restore=recovery.restore if recovery else None,
            ),
            plan=plan,
            settings=settings,
            folder=folder,
            spec=spec,
        )
    except SystemExit:
        raise
    except BaseException as error:
        kind = "lost" if isinstance(error, RankError) else "failed"
        world.report(f"{kind}: {' '.join(str(error).split()) or type(error).__name__}")
        if rank:
            _leave(error, rank, place)
        world.kill()
        raise


def _start_threads(
    stages: list[Stage], plan: Plan, cores: frozenset[int]
) -> InProcessTransport | None:
    """Every stage but the first in a thread, on cores next to those of the first."""
    if len(stages) == 1:
        return None
    allowed, num_threads = sorted(os.sched_getaffinity(0)), len(cores)
    return connect(
        [torch.device(place.device) for place in plan.stages],
        lambda rank, links: serve(stages[rank], links, World(rank, len(stages))),
        [
            frozenset(allowed[rank * num_threads : (rank + 1) * num_threads])
            for rank in range(len(stages))
        ],
    )


def _leave(error: BaseException, rank: int, place: Launched | None) -> NoReturn:
    """Ends a rank above 0 that failed, in one line, without waiting for peers that may be gone."""
    name = "" if isinstance(error, (ValueError, RankError)) else type(error).__name__ + ": "
    print(f"[rank {rank} stage {rank}] {name}{error}", file=sys.stderr, flush=True)
    os._exit(1)


def _devices(settings: Settings, place: Launched | None) -> list[str]:
    """The device of every stage; under a launcher there is one stage a rank."""
    if place is None:
        return choose_devices(settings)
    asked = settings.num_stages or settings.gpus or (settings.devices and len(settings.devices))
    if asked and asked != place.world_size:
        raise ValueError(
            f"load(): stages must be the launcher's number of ranks, {place.world_size}, "
            f"got {asked}; leave it out or launch {asked} ranks"
        )
    if settings.devices is not None:
        return list(settings.devices)
    ranks_here = _ranks_here(place)
    local = choose_devices(settings.model_copy(update={"stages": ranks_here, "gpus": None}))
    return [local[rank % ranks_here] for rank in range(place.world_size)]


def _hosts(settings: Settings, place: Launched | None) -> list[str] | None:
    """Machine of each rank of a launcher; in a plain session there is only this one."""
    if place is not None:
        return [f"node-{rank // _ranks_here(place)}" for rank in range(place.world_size)]
    if settings.hosts is not None and len(set(settings.hosts)) > 1:
        raise ValueError(
            f"load(): hosts must be one without a launcher, got {settings.hosts}; start a rank on "
            "each with torchrun, deepspeed or srun"
        )
    return None


def _gpu_owners(place: Launched | None, count: int) -> list[str] | None:
    """A name for every rank where a launcher may have given each a GPU of its own.

    With srun --gpus-per-task every rank sees one GPU, which each calls cuda:0.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if place is None or spawn.is_spawned() or visible is None or "," in visible:
        return None
    return [f"rank-{rank}" for rank in range(count)]


def _dtype(settings: Settings, devices: list[str], hf_config: Any) -> torch.dtype:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if devices[0] == "cpu":
        return torch.float32
    return hf_config.dtype or torch.float16


def _limits(settings: Settings, spec: ModelSpec) -> Limits:
    max_tokens = settings.max_tokens
    if max_tokens is None:
        max_tokens = min(DEFAULT_MAX_TOKENS, spec.max_positions or DEFAULT_MAX_TOKENS)
    elif spec.max_positions is not None and max_tokens > spec.max_positions:
        raise ValueError(
            f"load(): max_tokens must be at most the model's {spec.max_positions} positions, "
            f"got {max_tokens}; lower it or leave it out"
        )
    return Limits(
        num_slots=settings.max_sequences,
        max_tokens=max_tokens,
        max_rows=settings.prefill_chunk + settings.max_sequences,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
    )


def _check_host_memory(plan: Plan, place: Launched | None) -> None:
    """Refuses CPU stages that all of this machine's memory could not hold, whatever else runs."""
    here = len(plan.stages) if place is None else _ranks_here(place)
    stages = [stage for stage in plan.stages[:here] if stage.device == "cpu"]
    needed = sum(stage.needed_bytes for stage in stages)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > total:
        kv_bytes = sum(stage.kv_bytes for stage in stages)
        raise ValueError(
            f"load(): the stages on the CPU must fit this machine's {format_bytes(total)}, got "
            f"{format_bytes(needed)}, of it {format_bytes(kv_bytes)} KV cache; lower max_sequences "
            "or max_tokens, or use a smaller model"
        )


def _share_cores(settings: Settings, plan: Plan, place: Launched | None) -> frozenset[int]:
    """Sets torch's threads and returns the cores of this rank, an equal share of this machine's.

    CPU stages would otherwise fight for cores. No cores (any) where there is nothing to share, with
    fewer cores than threads, or where a launcher has chosen already. A rank that is all
    ours keeps to its cores; rank 0 may be a user's session, which keeps all.
    """
    num_here = len(plan.stages) if place is None else _ranks_here(place)
    allowed = sorted(os.sched_getaffinity(0))
    num_threads = settings.threads_per_stage
    if num_threads is not None and num_threads > (os.cpu_count() or num_threads):
        raise ValueError(
            f"load(): threads_per_stage must be at most this machine's {os.cpu_count()} cores, got "
            f"{num_threads}; lower it or leave it out"
        )
    if num_threads is None and num_here > 1:
        num_threads = max(1, len(allowed) // num_here)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if num_here == 1 or num_threads is None or num_here * num_threads > len(allowed):
        return frozenset()
    begin = (0 if place is None else place.local_rank) * num_threads
    cores = frozenset(allowed[begin : begin + num_threads])
    if place is not None and place.rank:
        rendezvous.stay_on(cores)
    return cores


def _ranks_here(place: Launched) -> int:
    text = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(text) if text else place.world_size


def _eos_token_ids(folder: Path, hf_config: Any) -> frozenset[int]:
    if (folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        eos = hf_config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])
