"""Decides where stages run: devices, machines, and the rank and memory of this process."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dist_int8.config import Settings
from dist_int8.distributed import environment, interfaces, launchers, spawn
from dist_int8.distributed.environment import Launched
from dist_int8.partition import Plan, format_bytes
from dist_int8.partition.devices import choose_devices, connects_over_nccl


@dataclass(frozen=True)
class Placement:
    """The devices of all stages, and this process's place among the ranks.

    Attributes:
        launched: place among the ranks of a launcher, or of `spawn`; None in a plain session.
        devices: "cpu" or "cuda:N" of every stage.
        hosts: machine of every rank of a launcher; None: all stages are on this one.
        uses_nccl: whether hidden states travel over NCCL.
    """

    launched: Launched | None
    devices: list[str]
    hosts: list[str] | None
    uses_nccl: bool

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return 0 if self.launched is None else self.launched.rank

    @property
    def num_here(self) -> int:
        """Number of stages on this machine."""
        return len(self.devices) if self.launched is None else _ranks_here(self.launched)


def find_placement(settings: Settings) -> Placement:
    """Finds the devices and ranks from the settings, the environment and this machine's GPUs.

    Raises:
        ValueError: the settings ask for what the launcher, or this machine, does not have.
    """
    launched = environment.find_launched()
    if launched is not None and not spawn.is_spawned():
        launchers.end_with_launchers()
    if settings.recover and launched is not None and not spawn.is_spawned():
        raise ValueError(
            "load(): recover must be false under a launcher, got true; leave it out, and let the "
            "launcher start all ranks again"
        )
    if settings.in_process and (launched is not None or settings.recover):
        raise ValueError(
            "load(): in_process must be false under a launcher and with recover, got true; leave "
            "it out"
        )
    devices = _find_devices(settings, launched)
    _check_interface(settings, len(devices))
    hosts = _find_hosts(settings, launched)
    owners = find_gpu_owners(launched, len(devices)) or hosts
    return Placement(launched, devices, hosts, connects_over_nccl(settings, devices, owners))


def _check_interface(settings: Settings, num_stages: int) -> None:
    """Refuses an interface that is not there, and one on which nothing would listen."""
    if settings.interface is None:
        return
    interfaces.check(settings.interface)
    if num_stages == 1 or settings.in_process:
        why = "in_process" if settings.in_process else "a single stage"
        raise ValueError(
            f"load(): interface must be left out with {why}, got {settings.interface!r}; no rank "
            "listens for another"
        )


def _find_devices(settings: Settings, launched: Launched | None) -> list[str]:
    """Finds the device of every stage; under a launcher there is one stage per rank."""
    if launched is None:
        return choose_devices(settings)
    num_stages = settings.num_stages or settings.gpus or len(settings.devices or ())
    if num_stages and num_stages != launched.world_size:
        raise ValueError(
            f"load(): stages must be the launcher's number of ranks, {launched.world_size}, "
            f"got {num_stages}; leave it out or launch {num_stages} ranks"
        )
    if settings.devices is not None:
        return list(settings.devices)
    ranks_here = _ranks_here(launched)
    local = choose_devices(settings.model_copy(update={"stages": ranks_here, "gpus": None}))
    return [local[rank % ranks_here] for rank in range(launched.world_size)]


def _find_hosts(settings: Settings, launched: Launched | None) -> list[str] | None:
    """Finds the machine of each rank of a launcher; a plain session has only this one."""
    if launched is not None:
        return [f"node-{rank // _ranks_here(launched)}" for rank in range(launched.world_size)]
    if settings.hosts is not None and len(set(settings.hosts)) > 1:
        raise ValueError(
            f"load(): hosts must be one machine without a launcher, got {settings.hosts}; start "
            "a rank on each with torchrun, deepspeed or srun"
        )
    return None


def find_gpu_owners(launched: Launched | None, count: int) -> list[str] | None:
    """Names every rank as an owner, if the launcher may have given each a GPU of its own.

    With srun --gpus-per-task every rank sees a single GPU, which each calls cuda:0.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if launched is None or spawn.is_spawned() or visible is None or "," in visible:
        return None
    return [f"rank-{rank}" for rank in range(count)]


def _ranks_here(launched: Launched) -> int:
    text = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(text) if text else launched.world_size


def check_host_memory(plan: Plan, placement: Placement) -> None:
    """Refuses CPU stages that need more than all of this machine's memory.

    Raises:
        ValueError: they do not fit, even if nothing else runs.
    """
    stages = [stage for stage in plan.stages[: placement.num_here] if stage.device == "cpu"]
    needed = sum(stage.needed_bytes for stage in stages)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > total:
        kv_bytes = sum(stage.kv_bytes for stage in stages)
        raise ValueError(
            f"load(): the stages on the CPU must fit this machine's {format_bytes(total)}, got "
            f"{format_bytes(needed)}, {format_bytes(kv_bytes)} of it KV cache; lower max_sequences "
            "or max_tokens, or use a smaller model"
        )
