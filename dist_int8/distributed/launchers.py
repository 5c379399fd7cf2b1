"""The launchers above this rank: when one of them is gone, the rank ends too.

deepspeed's command dies at SIGTERM and leaves the process between it and the ranks; torchrun's
agent, killed by SIGKILL, leaves the ranks. Such ranks would hold their GPUs for ever. So a rank
looks up the launchers among its ancestors as soon as it begins, and watches all of them. Shells,
terminals and service managers are no launchers: `nohup`, `disown` and a closed terminal end no
rank. Linux only, by /proc; elsewhere nothing is watched. No torch here.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

POLL_S = 0.5
EXIT_CODE = 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MODULES = {  # what stands after python -m
    "accelerate.commands.accelerate_cli": "accelerate",
    "accelerate.commands.launch": "accelerate",
    "deepspeed.launcher.launch": "deepspeed",
    "deepspeed.launcher.runner": "deepspeed",
    "dist_int8": "dist-int8 launch",
    "torch.distributed.launch": "torchrun",
    "torch.distributed.run": "torchrun",
}
_SCRIPTS = {  # console scripts that Python runs
    "accelerate": "accelerate",
    "accelerate-launch": "accelerate",
    "deepspeed": "deepspeed",
    "deepspeed.pt": "deepspeed",
    "dist-int8": "dist-int8 launch",
    "ds": "deepspeed",
    "torchrun": "torchrun",
}
_PROGRAMS = {  # launchers that are no Python
    "hydra_pmi_proxy": "mpirun",
    "mpiexec": "mpirun",
    "mpirun": "mpirun",
    "orted": "mpirun",
    "prted": "mpirun",
    "prterun": "mpirun",
    "slurmstepd": "srun",
}
_lock = threading.Lock()
_watching_in: int | None = None  # process id: a forked child has no watching thread
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launcher:
    """A process above this one that starts ranks, told from a later one of the same number.

    Attributes:
        name: what its user typed.
        pid: its number.
        started: in clock ticks since the machine started.
    """

    name: str
    pid: int
    started: int

    @property
    def lives(self) -> bool:
        """Whether it still runs; a zombie does not."""
        found = _read_stat(self.pid)
        return found is not None and found.state not in "ZX" and found.started == self.started


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    started: int


def find_launchers(pid: int | None = None) -> list[Launcher]:
    """The launchers above a process, by default this one, nearest first."""
    found = _read_stat(os.getpid() if pid is None else pid)
    launchers = []
    while found is not None and found.parent > 0:
        pid = found.parent
        found = _read_stat(pid)
        name = name_launcher(_read_command(pid))
        if found is not None and name is not None:
            launchers.append(Launcher(name, pid, found.started))
    return launchers


def name_launcher(command: list[str]) -> str | None:
    """The launcher that a command line belongs to; None for anything else."""
    if not command:
        return None
    program, *rest = command
    base = Path(program).name
    if base.startswith("slurmstepd:"):  # it writes its job into its command line
        return "srun"
    if base in _PROGRAMS:
        return _PROGRAMS[base]
    if not re.match(r"(python|pypy)[\d.]*$", base):
        return None
    known = _SCRIPTS
    while rest and rest[0].startswith("-"):
        flag = rest.pop(0)
        if flag == "-c":
            return None
        if flag == "-m":
            known = _MODULES
            break
        if flag in ("-W", "-X"):
            rest = rest[1:]
    name = known.get(Path(rest[0]).name) if rest else None
    return None if name == "dist-int8 launch" and rest[1:2] != ["launch"] else name


def end_with_launchers() -> None:
    """Ends this process from now on when one of the launchers above it ends. Safe to call twice."""
    global _watching_in
    with _lock:
        if _watching_in == os.getpid():
            return
        _watching_in = os.getpid()
    parent = os.getppid()
    launchers = find_launchers()
    if not launchers:
        return
    if launchers[0].pid == parent and launchers[0].name not in ("mpirun", "srun"):
        # The kernel ends even a rank that is stopped, or busy in a kernel of its own. It does so
        # when the thread that started this process ends: known to be the main one of these.
        ask_for_death_with_parent()()
        if os.getppid() != parent:
            _leave(launchers[0])  # it ended between the two requests
    threading.Thread(target=_watch, args=(launchers,), name="launchers", daemon=True).start()


def ask_for_death_with_parent() -> Callable[[], None]:
    """What a child calls so that the kernel kills it when the thread that started it ends.

    The C library is looked up here, before a fork, after which little may be called. Linux only;
    elsewhere the child outlives a parent that was killed.
    """
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _watch(launchers: list[Launcher]) -> None:
    while True:
        for launcher in launchers:
            if not launcher.lives:
                _leave(launcher)
        time.sleep(POLL_S)


def _leave(launcher: Launcher) -> NoReturn:
    gone = f"{launcher.name} (process {launcher.pid}) is gone"
    logger.error("[rank %s] %s: this rank ends", os.environ.get("RANK", "?"), gone)
    os._exit(EXIT_CODE)


def _read_stat(pid: int) -> _Stat | None:
    """State, parent and start of a process; None where there is none, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return _Stat(state=fields[0], parent=int(fields[1]), started=int(fields[19]))


def _read_command(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return text.rstrip("\0").split("\0")
