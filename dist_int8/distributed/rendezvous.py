"""Ranks and process groups: a process joins as the rank that its environment says.

Under deepspeed, torchrun, srun or `dist-int8 launch` the environment has RANK and WORLD_SIZE. In a
plain Python session rank 0 starts the others itself (`spawn`). Either way the ranks meet in a
torch store, where rank 0 publishes its heartbeat address; from then on `world` knows which
ranks are alive, which failed and why.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_int8.distributed import interfaces
from dist_int8.distributed.environment import Launched
from dist_int8.distributed.logs import RankLogger
from dist_int8.distributed.monitor import Monitor
from dist_int8.distributed.states import State
from dist_int8.distributed.world import POLL_S, STEP_TIMEOUT_S, World
from dist_int8.errors import RankError, RankLostError

# A stage waits for its next micro-batch as long as the user takes; heartbeats, not this timeout,
# detect a rank that is gone, stopped or cut off.
IDLE_TIMEOUT = timedelta(days=30)
ADDRESS_KEY = "heartbeats"  # of the store: where rank 0 listens for them
_joined = itertools.count()  # pipelines of this process; every rank counts alike


def join(
    place: Launched,
    uses_nccl: bool,
    timeout_s: float,
    cores: frozenset[int] = frozenset(),
    interface: str | None = None,
    step_timeout_s: float = STEP_TIMEOUT_S,
) -> World:
    """Joins the ranks that a launcher, or `spawn`, started; `interfaces` says where they listen.

    Raises:
        RankError: another rank did not join in time, or failed meanwhile.
    """
    world = World(place.rank, place.world_size, step_timeout_s, cores)
    if place.world_size == 1:
        return world
    folder = os.environ.get("DIST_INT8_FOLDER")
    one_machine = bool(folder) or interfaces.on_one_machine(os.environ)
    listen_on = world.listen_on = interfaces.choose(interface, one_machine)
    if folder:
        world.generation = int(os.environ.get("DIST_INT8_GENERATION", "0"))
        store = file_store(Path(folder), world, timeout_s)
    elif dist.is_initialized():
        default = dist.distributed_c10d._get_default_store()
        store = dist.PrefixStore(f"dist_int8/{next(_joined)}", default)
    else:
        store = _reach_store(place, timeout_s)
    try:
        if place.rank == 0:
            host = interfaces.find_address(listen_on)
            world.monitor = Monitor(world.others, host, step_timeout_s)
            store.set(ADDRESS_KEY, world.monitor.address)
            meet(world, store, uses_nccl, timeout_s)
        else:
            world.watch(_address_of_rank_0(store, world, timeout_s), timeout_s)
            connect(world, store, uses_nccl, timeout_s)
    except BaseException:
        if place.rank == 0:
            world.kill()
        raise
    here = ", ".join(listen_on.values())
    RankLogger(__name__, place.rank).info(
        "joined %d ranks, listening on %s", world.world_size, here
    )
    return world


def file_store(folder: Path, world: World, timeout_s: float) -> dist.Store:
    store = dist.FileStore(str(folder / f"store-{world.generation}"), world.world_size)
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _address_of_rank_0(store: dist.Store, world: World, timeout_s: float) -> str:
    """What rank 0 left in the store once it was there."""
    try:
        store.wait([ADDRESS_KEY], timedelta(seconds=timeout_s))
        return store.get(ADDRESS_KEY).decode()
    except (RuntimeError, dist.DistError) as error:
        raise _missing_rank_0(world.world_size, timeout_s, error) from None


def _missing_rank_0(world_size: int, timeout_s: float, error: BaseException) -> RankLostError:
    return RankLostError(
        f"rank 0 of {world_size} has not joined after {timeout_s:g} s ({reason(error)}); see "
        "whether the launcher started it",
        0,
    )


def meet(world: World, store: dist.Store, uses_nccl: bool, timeout_s: float) -> None:
    """Waits, on rank 0, for every other rank, and connects them."""
    world.wait_for(State.JOINED, timeout_s)
    connect(world, store, uses_nccl, timeout_s)


def stay_on(cores: frozenset[int]) -> None:
    """Keeps the calling thread, and threads that it starts, on these cores; empty: leaves it."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def connect(world: World, store: dist.Store, uses_nccl: bool, timeout_s: float) -> None:
    """Starts the groups so that gloo's own thread stays on this rank's cores.

    On the core of another busy stage that thread would wait for its turn of the scheduler, several
    milliseconds, though this rank idles. A thread passes its cores on to those it starts, so the
    groups are made in one; the caller, which may be a user's session, keeps all of its cores. And
    the caller looks meanwhile whether the others live: gloo waits for one that ended.
    """
    result: list[dict[str, Any] | BaseException] = []

    def start() -> None:
        try:
            stay_on(world.cores)
            result.append(_start_groups(world, store, uses_nccl, timeout_s))
        except BaseException as error:  # raised again where it is awaited
            result.append(error)

    thread = threading.Thread(target=start, name="connect", daemon=True)
    thread.start()
    generation = world.generation
    while not result:
        thread.join(POLL_S)
        world.check()
        if world.pulse is not None and world.ordered > generation:
            raise RankError("lost: rank 0 ordered the ranks to regroup")
    if isinstance(result[0], dict):
        world.groups = result[0]
    elif isinstance(result[0], (RuntimeError, dist.DistError)):
        error = RankError(f"the ranks cannot connect: {reason(result[0])}")
        raise error if world.rank else world.find_cause(error)
    else:
        raise result[0]


def _start_groups(
    world: World, store: dist.Store, uses_nccl: bool, timeout_s: float
) -> dict[str, Any]:
    """Connects the ranks: gloo for headers and results, NCCL or gloo for hidden states."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=timeout_s)  # for connecting; later waits set their own
    options._devices = [gloo.create_device(**world.listen_on)]
    place = (world.rank, world.world_size)
    groups = {"cpu": gloo(dist.PrefixStore("gloo", store), *place, options)}
    if uses_nccl:  # otherwise hidden_states go through host memory, by gloo
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = IDLE_TIMEOUT
        groups["cuda"] = dist.ProcessGroupNCCL(
            dist.PrefixStore("nccl", store), *place, nccl_options
        )
    return groups


def _master_address() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _reach_store(place: Launched, timeout_s: float) -> dist.Store:
    """The TCP store at MASTER_ADDR:MASTER_PORT; rank 0 listens on that address only.

    torch would listen on every interface, so the listening socket is made here.
    """
    host, port = _master_address(), int(os.environ.get("MASTER_PORT", "29500"))
    timeout = timedelta(seconds=timeout_s)
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if place.rank or hosted_by_agent:
        try:
            store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        except (RuntimeError, dist.DistError) as error:
            raise _missing_rank_0(place.world_size, timeout_s, error) from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"dist_int8/{attempt}/{next(_joined)}", store)
    family = socket.getaddrinfo(host, port)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ValueError(
            f"environment: MASTER_ADDR:MASTER_PORT must be a free address of this machine, got "
            f"{host}:{port} ({error.strerror}); choose another MASTER_PORT"
        ) from None
    listener.listen(128)
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return dist.PrefixStore(f"dist_int8/0/{next(_joined)}", store)


def reason(error: BaseException) -> str:
    """What went wrong in a few words, without torch's source lines and advice."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", first_line).split(". This is typically")[0]
