"""How many threads a stage has by default, and when it is kept to cores of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, sys, torch
from dist_int8.api.cores import share_cores
from dist_int8.api.placement import Placement
from dist_int8.config import Settings
default = torch.get_num_threads()
for stages, settings in json.loads(sys.argv[1]):
    torch.set_num_threads(default)
    placement = Placement(None, ["cpu"] * stages, None, False)
    cores = share_cores(Settings(model="any", **settings), placement)
    print(torch.get_num_threads(), len(cores))
"""
NUM_CORES = len(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(
    NUM_CORES < 2 or os.cpu_count() != NUM_CORES, reason="needs all cores of a machine with two"
)


def share(cases, prefix=(), **environment):
    """Threads per stage, and the cores that rank 0 keeps to (0: any), of (stages, settings)."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PROGRAM, json.dumps(cases)],
        capture_output=True,
        text=True,
        env={**kept, **environment},
    )
    assert done.returncode == 0, done.stderr
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


@pytest.fixture
def in_quota():
    """A command prefix that runs in a cgroup with a CPU quota of 1.2 cores."""
    version_1, version_2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    parent = version_1 if version_1.is_dir() else version_2
    folder = parent / f"dist_int8_test_{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no cgroup can be made here")
    try:
        if (folder / "cpu.max").exists():
            (folder / "cpu.max").write_text("120000 100000")
        else:
            (folder / "cpu.cfs_quota_us").write_text("120000")
        yield ["sh", "-c", f'echo $$ > {folder}/cgroup.procs; exec "$@"', "sh"]
    except OSError:
        pytest.skip("no cgroup with a CPU controller can be written here")
    finally:
        folder.rmdir()


@needs_two_cores
def test_a_machine_of_our_own_is_shared_evenly_and_pinned():
    half = NUM_CORES // 2
    cases = [(2, {}), (2, {"pin_cores": False}), (2, {"threads_per_stage": NUM_CORES})]
    assert share(cases) == [(half, half), (half, 0), (NUM_CORES, 0)]


@needs_two_cores
def test_a_quota_lowers_the_threads_and_nobody_is_pinned(in_quota):
    one = {"threads_per_stage": 1}
    cases = [
        (1, {}),
        (2, {}),
        (2, one),
        (2, {**one, "pin_cores": True}),
        (1, {"threads_per_stage": 2}),
    ]
    assert share(cases, in_quota) == [(1, 0), (1, 0), (1, 0), (1, 1), (2, 0)]
    assert share([(1, {})], in_quota, OMP_NUM_THREADS="2") == [(2, 0)]


@needs_two_cores
def test_some_cores_of_a_machine_are_not_ours_alone():
    last = max(os.sched_getaffinity(0))
    cases = [(1, {}), (2, {"threads_per_stage": 1})]
    assert share(cases, ["taskset", "-c", str(last)]) == [(1, 0), (1, 0)]
