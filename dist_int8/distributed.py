"""Ranks and process groups: joins a launcher's ranks or starts its own, and knows who is alive.

Under deepspeed, torchrun, srun or `dist-int8 launch` the environment has RANK and WORLD_SIZE and a
process joins as that rank. In a plain Python session rank 0 starts the others itself. Either way
the ranks meet in a torch store, where each leaves its state ("joined", "ready", "failed: why" or
"lost: which neighbour"), so that rank 0 can name the rank that is missing or broken.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_int8 import interfaces, slurm

SHUTDOWN_TIMEOUT_S = 5.0
POLL_S = 0.1
# A stage may wait for its next micro-batch as long as the user thinks; a dead peer is noticed by
# its closed connection and by rank 0's watch over the others, not by this.
IDLE_TIMEOUT = timedelta(days=30)


class RankDied(RuntimeError):
    """A rank of the pipeline ended or failed while it was needed; the message names it."""


@dataclass(frozen=True)
class Launched:
    """This process's place among the ranks that a launcher started."""

    rank: int
    world_size: int
    local_rank: int


def launched() -> Launched | None:
    """The ranks of the launcher around this process, or None in a plain session.

    Raises:
        ValueError: RANK and WORLD_SIZE do not fit each other.
    """
    slurm.adopt()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    values = {}
    for name, default in (("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        try:
            values[name] = int(text or "")
        except ValueError:
            raise ValueError(
                f"environment: {name} must be an integer, got {text!r}; unset it or use a launcher"
            ) from None
    if not 0 <= values["RANK"] < values["WORLD_SIZE"]:
        raise ValueError(
            f"environment: RANK must be 0 to WORLD_SIZE - 1 = {values['WORLD_SIZE'] - 1}, "
            f"got {values['RANK']}; fix the launcher's environment"
        )
    return Launched(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])


@dataclass
class World:
    """The ranks of one pipeline as one of them sees it.

    Attributes:
        rank, world_size: this process's place.
        store: where ranks leave their state; None when there is only one.
        children: processes of the ranks that this one started, by rank.
        groups: process groups by device type, "cpu" (gloo) and for GPUs "cuda" (NCCL). They are
            this pipeline's own, beside torch's default group: a session can hold several pipelines.
        cores: CPU cores of this rank; empty: any.
    """

    rank: int
    world_size: int
    store: Any = None
    children: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    folder: Path | None = None
    groups: dict[str, Any] = field(default_factory=dict)
    cores: frozenset[int] = frozenset()

    def report(self, state: str) -> None:
        """Leaves this rank's state ("ready", "failed: why") for rank 0."""
        if self.store is not None:
            self.store.set(f"state/{self.rank}", state)

    def check(self) -> None:
        """Raises RankDied, naming the rank and its reason, if one failed or ended."""
        cause = self._cause()
        if cause is not None:
            raise RankDied(cause)

    def blame(self, error: RankDied, patience_s: float = 1.0) -> RankDied:
        """A failure seen from here, with the name of the rank that caused it if that shows in time.

        A closed connection is seen before the process that closed it is reaped or its reason read,
        and a rank may fail only because its neighbour did.
        """
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            try:
                cause = self._cause(with_victims=False)
            except RankDied:
                break
            if cause is not None:
                return RankDied(cause)
            time.sleep(POLL_S)
        return error

    def _cause(self, with_victims: bool = True) -> str | None:
        """Who failed and why; `with_victims` also takes ranks that only lost a neighbour."""
        for rank, child in self.children.items():
            if child.poll() is not None and child.returncode < 0:
                return f"rank {rank} (process {child.pid}) {_describe_exit(child)}"
        states = {r: self._state(r) for r in range(self.world_size) if r != self.rank}
        for prefix in ("failed: ", "lost: ")[: 1 + with_victims]:
            for rank, state in states.items():
                if state.startswith(prefix):
                    return f"rank {rank} {state}"
        for rank, child in self.children.items():
            if child.poll() is not None and not states[rank].startswith("lost: "):
                return f"rank {rank} (process {child.pid}) {_describe_exit(child)}"
        return None

    def wait_for(self, state: str, timeout_s: float) -> None:
        """Returns once every other rank has left this state.

        Raises:
            RankDied: a rank failed or ended, or did not get there in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            missing = [
                r for r in range(self.world_size) if r != self.rank and self._state(r) != state
            ]
            if not missing:
                return
            self.check()
            if time.monotonic() > deadline:
                names = ", ".join(map(str, missing))
                raise RankDied(
                    f"rank {names} of {self.world_size} is not {state} after {timeout_s:.0f} s; "
                    "see whether the launcher started it"
                )
            time.sleep(POLL_S)

    def close(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Ends the process groups and every rank that this one started. Safe to call twice."""
        deadline = time.monotonic() + timeout_s
        for child in self.children.values():
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdin:
                child.stdin.close()
        self.children.clear()
        self.groups.clear()
        self.store = None
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def kill(self) -> None:
        """Ends the started ranks at once, for when they cannot be asked to end any more."""
        for child in self.children.values():
            child.kill()
        self.close()

    def _state(self, rank: int) -> str:
        key = f"state/{rank}"
        try:
            return self.store.get(key).decode() if self.store.check([key]) else ""
        except (RuntimeError, dist.DistError) as error:  # the rank that hosts the store is gone
            raise RankDied(f"the ranks' meeting point is gone: {reason(error)}") from None


def alone() -> World:
    """The world of a pipeline with one stage: no store, no process group."""
    return World(rank=0, world_size=1)


def spawn(
    world_size: int,
    settings: dict[str, Any],
    device_types: set[str],
    timeout_s: float,
    cores: frozenset[int] = frozenset(),
) -> World:
    """Starts ranks 1 .. world_size - 1 on this machine and joins them as rank 0.

    Each is `python -m dist_int8.rank`, gets `settings` as a line of JSON on its standard input, and
    ends when that pipe closes, so none outlives this process however it ends.
    """
    folder = Path(tempfile.mkdtemp(prefix="dist_int8-"))
    world = World(0, world_size, folder=folder, cores=cores)
    world.store = dist.FileStore(str(folder / "store"), world_size)
    in_main_thread = threading.current_thread() is threading.main_thread()
    line = json.dumps(settings).encode() + b"\n"
    try:
        for rank in range(1, world_size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "DIST_INT8_STORE": str(folder / "store"),
                # the kernel watches the thread that starts a process, which may end early
                "DIST_INT8_DIES_WITH_PARENT": "1" * in_main_thread,
            }
            child = subprocess.Popen(
                [sys.executable, "-m", "dist_int8.rank"],
                stdin=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is rank 0's to handle
            )
            world.children[rank] = child
            assert child.stdin is not None
            child.stdin.write(line)
            child.stdin.flush()
        world.wait_for("joined", timeout_s)
        _start_groups_on_cores(world, device_types, interfaces.choose(None, one_machine=True))
    except BaseException:
        world.kill()
        raise
    return world


def join(
    place: Launched,
    device_types: set[str],
    timeout_s: float,
    cores: frozenset[int] = frozenset(),
    interface: str | None = None,
) -> World:
    """Joins the ranks that a launcher, or `spawn`, started; `interfaces` says where they listen."""
    world = World(place.rank, place.world_size, cores=cores)
    if place.world_size == 1:
        return world
    spawned = os.environ.get("DIST_INT8_STORE")
    one_machine = bool(spawned) or interfaces.on_one_machine(os.environ)
    listen_on = interfaces.choose(None if spawned else interface, one_machine)
    if spawned:
        world.store = dist.FileStore(spawned, place.world_size)
    elif dist.is_initialized():
        world.store = dist.PrefixStore("dist_int8", dist.distributed_c10d._get_default_store())
    else:
        world.store = _store_of_launcher(place, timeout_s)
    world.report("joined")
    if place.rank == 0:
        world.wait_for("joined", timeout_s)
    _start_groups_on_cores(world, device_types, listen_on)
    return world


def stay_on(cores: frozenset[int]) -> None:
    """Keeps the calling thread, and threads that it starts, on these cores; empty: leaves it."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _start_groups_on_cores(world: World, device_types: set[str], listen_on: dict[str, str]) -> None:
    """Starts the groups so that gloo's own thread stays on this rank's cores.

    On the core of another busy stage that thread would wait for its turn of the scheduler, several
    milliseconds, though this rank idles. A thread passes its cores on to those it starts, so the
    groups are made in one; the caller, which may be a user's session, keeps all of its cores.
    """
    failure: list[BaseException] = []

    def start() -> None:
        try:
            stay_on(world.cores)
            _start_groups(world, device_types, listen_on)
        except BaseException as error:  # raised again where it is awaited
            failure.append(error)

    thread = threading.Thread(target=start, name="connect")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def _start_groups(world: World, device_types: set[str], listen_on: dict[str, str]) -> None:
    """Connects the ranks: gloo for headers, results and CPU stages, NCCL between GPUs."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = IDLE_TIMEOUT
    options._devices = [gloo.create_device(**listen_on)]
    place = (world.rank, world.world_size)
    world.groups["cpu"] = gloo(dist.PrefixStore("gloo", world.store), *place, options)
    if device_types == {"cuda"}:  # mixed with CPU stages, hidden_states go through gloo
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = IDLE_TIMEOUT
        world.groups["cuda"] = dist.ProcessGroupNCCL(
            dist.PrefixStore("nccl", world.store), *place, nccl
        )


def _master_address() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _store_of_launcher(place: Launched, timeout_s: float) -> dist.Store:
    """The TCP store at MASTER_ADDR:MASTER_PORT; rank 0 listens on that address only.

    torch would listen on every interface, so the listening socket is made here.
    """
    host, port = _master_address(), int(os.environ.get("MASTER_PORT", "29500"))
    timeout = timedelta(seconds=timeout_s)
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if place.rank or hosted_by_agent:
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"dist_int8/{attempt}", store)
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
    return dist.PrefixStore("dist_int8/0", store)


def _describe_exit(child: subprocess.Popen[bytes]) -> str:
    code = child.returncode
    if code is not None and code < 0:
        return f"died with signal {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def reason(error: BaseException) -> str:
    """What went wrong in a few words, without torch's source lines and advice."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", first_line).split(". This is typically")[0]
