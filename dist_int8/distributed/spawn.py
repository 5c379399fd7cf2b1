"""Ranks that `load()` starts itself, on this machine: started, and restarted when lost."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_int8.distributed import interfaces, interpreter, rendezvous
from dist_int8.distributed.children import make_folder
from dist_int8.distributed.logs import RankLogger
from dist_int8.distributed.monitor import Monitor
from dist_int8.distributed.states import State
from dist_int8.distributed.world import STEP_TIMEOUT_S, World


def is_spawned() -> bool:
    """Whether this process is a rank that `spawn` started."""
    return "DIST_INT8_FOLDER" in os.environ


def spawn(
    world_size: int,
    settings: dict[str, Any],
    uses_nccl: bool,
    timeout_s: float,
    cores: frozenset[int] = frozenset(),
    interface: str | None = None,
    step_timeout_s: float = STEP_TIMEOUT_S,
) -> World:
    """Starts ranks 1 .. world_size - 1 on this machine and joins them as rank 0.

    Each runs `dist_int8.launcher.rank`, gets `settings` as a line of JSON on its standard
    input, and ends when that pipe closes, so none outlives this process however it ends.
    """
    world = World(0, world_size, step_timeout_s, cores)
    world.children.folder = make_folder()
    line = json.dumps(settings).encode() + b"\n"
    world.children.start = lambda rank: _start_rank(world, rank, line)
    try:
        world.listen_on = interfaces.choose(interface, one_machine=True)
        host = interfaces.find_address(world.listen_on)
        world.monitor = Monitor(world.others, host, step_timeout_s)
        store = _open_store(world, timeout_s)
        for rank in world.others:
            world.children.start(rank)
        rendezvous.meet(world, store, uses_nccl, timeout_s)
    except BaseException:
        world.kill()
        raise
    return world


def regroup(world: World, lost: set[int], uses_nccl: bool, timeout_s: float) -> None:
    """Restarts the lost ranks of `spawn` and connects all ranks again, on rank 0.

    Raises:
        RankError: a rank failed or did not join in time.
    """
    assert world.monitor is not None and world.children.start is not None
    for rank in lost:
        world.children.end(rank)
    world.groups.clear()
    world.generation += 1
    # A file of its own for the store: a rank that was killed may have left half a line in the old.
    store = _open_store(world, timeout_s, world.monitor.regroup(lost))
    for rank in sorted(lost):
        world.children.start(rank)
    rendezvous.meet(world, store, uses_nccl, timeout_s)


def rejoin(world: World, uses_nccl: bool, timeout_s: float) -> None:
    """Connects to the other ranks again, on a rank above 0, when rank 0 orders it.

    Raises:
        RankError: a rank failed or did not join in time, or rank 0 orders yet another regrouping.
    """
    world.groups.clear()
    world.generation = world.wait_for_order()
    world.report(State.JOINED)
    folder = Path(os.environ["DIST_INT8_FOLDER"])
    store = rendezvous.file_store(folder, world, timeout_s)
    rendezvous.connect(world, store, uses_nccl, timeout_s)


def _start_rank(world: World, rank: int, line: bytes) -> None:
    in_main_thread = threading.current_thread() is threading.main_thread()
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world.world_size),
        "LOCAL_RANK": str(rank),
        "DIST_INT8_FOLDER": str(world.children.folder),
        "DIST_INT8_GENERATION": str(world.generation),
        # the kernel watches the thread that started the process, and that may end early
        "DIST_INT8_DIES_WITH_PARENT": "1" * in_main_thread,
    }
    child = subprocess.Popen(
        interpreter.command("dist_int8.launcher.rank"),
        stdin=subprocess.PIPE,
        bufsize=0,  # closed in forked children, which must take no lock
        env=environment,
        start_new_session=True,  # Ctrl-C is rank 0's to handle
    )
    world.children[rank] = child
    RankLogger(__name__, world.rank).info("started rank %d as process %d", rank, child.pid)
    assert child.stdin is not None
    with suppress(BrokenPipeError):  # it ended already, which shows where it is awaited
        while line:
            line = line[child.stdin.write(line) :]


def _open_store(world: World, timeout_s: float, address: str | None = None) -> Any:
    """The store of this generation of started ranks, with the address for heartbeats in it."""
    assert world.monitor is not None and world.children.folder is not None
    store = rendezvous.file_store(world.children.folder, world, timeout_s)
    store.set(rendezvous.ADDRESS_KEY, address or world.monitor.address)
    return store
