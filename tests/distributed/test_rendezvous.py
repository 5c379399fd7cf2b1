"""Joining ranks: where they listen, who is missing, what the environment must say."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch

from dist_int8.distributed import rendezvous
from dist_int8.distributed.environment import Launched
from dist_int8.distributed.states import State
from dist_int8.errors import RankError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listening_addresses(pid: int) -> set[str]:
    """Local addresses, in /proc's hexadecimal, of the TCP sockets on which a process listens."""
    inodes = set()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{entry}")
        except FileNotFoundError:  # the descriptor of this very listing
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].split(":")[0])
    return found


def _rank(rank: int, port: int, queue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.pop("DIST_INT8_FOLDER", None)
    world = rendezvous.join(Launched(rank, 2, rank), False, 60.0)
    tensor = torch.full((1,), rank)
    world.groups["cpu"].allreduce([tensor]).wait()
    queue.put((rank, int(tensor), listening_addresses(os.getpid())))
    world.report(State.READY)
    if rank == 0:
        world.wait_for("ready", 30.0)
    world.close()


def test_launched_ranks_meet_and_listen_on_loopback_only():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    ranks = [context.Process(target=_rank, args=(rank, port, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = [queue.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    for _, total, addresses in results:
        assert total == 1
        assert addresses <= {"0100007F"}, addresses


def test_a_rank_that_never_joins_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RankError, match="rank 1, 2 of 3 has not joined after 1 s"):
        rendezvous.join(Launched(0, 3, 0), False, 1.0)


def test_a_taken_port_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ValueError, match=r"must be a free address .*another MASTER_PORT"):
            rendezvous.join(Launched(0, 2, 0), False, 1.0)
