"""Starts and supervises the ranks of one machine: what `dist-int8 launch` runs.

A thin supervisor. Each rank gets the environment that torchrun and deepspeed would give it, in one
process group of its own. The first rank that fails ends the others (TERM, then KILL) and its
exit code becomes ours; TERM and INT are passed on, the second one with KILL; and should the
supervisor itself be killed, the kernel ends the ranks (PR_SET_PDEATHSIG), so that no orphan holds a
GPU.
"""

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from types import FrameType

from dist_int8.distributed.cores import count_cores
from dist_int8.distributed.launchers import ask_for_death_with_parent

GRACE_SECONDS = 5.0
DRAIN_SECONDS = 35.0  # for rank 0 to answer what runs: its drain_timeout and a little more
_POLL_SECONDS = 0.05
logger = logging.getLogger(__name__)


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environment(rank: int, num_ranks: int, port: int, num_threads: int) -> dict[str, str]:
    """Environment of a rank. OMP_NUM_THREADS is set only where the user has not set it."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def launch(
    command: Sequence[str],
    num_ranks: int,
    grace: float = GRACE_SECONDS,
    drain: float = DRAIN_SECONDS,
) -> int:
    """Runs `command` once per rank and waits; returns the exit code of the first failure, or 0.

    A rank ended by signal N counts as exit code 128 + N, as in a shell.

    Args:
        command: program and arguments.
        num_ranks: number of processes.
        grace: seconds between TERM and KILL for ranks that have no work left.
        drain: seconds that the first rank gets to end after a TERM to the supervisor; the others
            then have the grace.
    """
    port = free_port()
    num_threads = max(1, count_cores() // num_ranks)
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_ranks):
            ranks.append(
                subprocess.Popen(
                    list(command),
                    env=rank_environment(rank, num_ranks, port, num_threads),
                    stdin=None if rank == 0 else subprocess.DEVNULL,
                    process_group=0,
                    preexec_fn=_die_with(os.getpid()),
                )
            )
        return _supervise(ranks, received, grace, drain)
    finally:
        _end(ranks, 0.0 if len(received) > 1 else grace)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _supervise(
    ranks: Sequence[subprocess.Popen[bytes]], received: list[int], grace: float, drain: float
) -> int:
    while True:
        if received:
            signum = received[0]
            logger.warning("launch: got %s, ending the ranks", signal.Signals(signum).name)
            _signal(ranks, signum)
            if signum == signal.SIGTERM:
                _wait(ranks, drain, received, for_all=False)
            _wait(ranks, grace, received)
            return 128 + signum
        codes = [rank.poll() for rank in ranks]
        for rank, code in enumerate(codes):
            if code:
                exit_code = 128 - code if code < 0 else code
                others = sum(other is None for other in codes)
                ended = f"; ending the other {others}" if others else ""
                cause = (
                    f"was killed by {signal.Signals(-code).name}"
                    if code < 0
                    else f"failed ({code})"
                )
                logger.error("launch: rank %d %s%s", rank, cause, ended)
                return exit_code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)


def _die_with(supervisor: int) -> Callable[[], None]:
    """Runs in the child before exec: the kernel kills it when the supervisor dies."""
    die_with_parent = ask_for_death_with_parent()

    def ask_kernel() -> None:
        die_with_parent()
        if os.getppid() != supervisor:  # it died between the fork and this request
            os._exit(128 + signal.SIGKILL)

    return ask_kernel


def _end(ranks: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    _signal(ranks, signal.SIGTERM)
    _wait(ranks, grace)
    _signal(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]],
    seconds: float,
    received: Sequence[int] = (),
    for_all: bool = True,
) -> None:
    """Waits until all ranks, or one, have ended, `seconds` have passed or a second signal came."""
    deadline = time.monotonic() + seconds
    until = any if for_all else all
    while until(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if len(received) > 1:
            return
        time.sleep(_POLL_SECONDS)


def _signal(ranks: Sequence[subprocess.Popen[bytes]], signum: int) -> None:
    """Signals the process group of each living rank, so that what it started ends too."""
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, signum)
