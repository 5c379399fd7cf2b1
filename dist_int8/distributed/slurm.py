"""Translates srun's environment to that of other launchers. Imports nothing of ours and no torch.

srun sets SLURM_PROCID and its like, but neither RANK nor a rendezvous address. With them filled in,
a plain `srun python launch/generate.py` is a launcher like any other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

STEP = ("SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
FIRST_PORT = 15000
NUM_PORTS = 10000  # below those that the kernel gives to outgoing connections


def adopt() -> None:
    """Adds RANK, WORLD_SIZE and the rest to this process's environment where srun started it."""
    os.environ.update(as_launcher(os.environ))


def as_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT of a task of srun.

    Nothing where another launcher has set RANK, outside of srun (a batch script has SLURM_PROCID
    too, but nothing of a step), and for a single task, which may start its own ranks. An
    address or port that is set already stays.

    Raises:
        ValueError: a variable of srun is not what srun writes.
    """
    if "RANK" in environment or not all(name in environment for name in STEP):
        return {}
    counts = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    if sum(counts) == 1:
        return {}
    node = _number(environment, "SLURM_NODEID")
    job = _number(environment, "SLURM_JOB_ID")
    first = first_host(environment["SLURM_STEP_NODELIST"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(sum(counts)),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(counts[min(node, len(counts) - 1)]),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first if len(counts) > 1 else "127.0.0.1"),
        # the same on every node, another for another job
        "MASTER_PORT": environment.get("MASTER_PORT", str(FIRST_PORT + job % NUM_PORTS)),
    }


def first_host(nodelist: str) -> str:
    """The first name of a list such as "gpu[03-05,9],login": "gpu03"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    assert first is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def tasks_per_node(text: str) -> list[int]:
    """[2, 2, 1] of "2(x2),1"."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(
                "environment: SLURM_STEP_TASKS_PER_NODE must be like 2(x2),1, got "
                f"{text!r}; start the ranks with srun"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "0")
    if not text.isdecimal():
        raise ValueError(
            f"environment: {name} must be a number, got {text!r}; start the ranks with srun"
        )
    return int(text)
