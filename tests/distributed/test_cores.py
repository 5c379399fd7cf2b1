"""The cores that a process may keep busy: affinity, and quotas of both versions of cgroups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_int8.distributed.cores import count_cores, read_quota


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def process(tmp_path):
    """process(cgroup, *mounts) -> a folder like /proc/self."""

    def make(cgroup, *mounts):
        write(
            tmp_path / "proc",
            cgroup=cgroup,
            mountinfo="\n".join(("1 0 8:1 / / rw - ext4 a rw", *mounts)),
        )
        return tmp_path / "proc"

    return make


def mount(point, kind, options, root="/"):
    return f"30 24 0:27 {root} {point} rw,nosuid shared:9 - {kind} {kind} {options}"


def test_the_least_quota_of_a_cgroup_and_those_above_it(process, tmp_path):
    top = tmp_path / "cgroup"
    write(top / "a" / "b", cpu__max="max 100000")
    write(top / "a", cpu__max="150000 100000")
    own = process("0::/a/b", mount(top, "cgroup2", "rw"))
    assert read_quota(own) == 1.5
    write(top / "a" / "b", cpu__max="50000 100000")
    assert read_quota(own) == 0.5
    write(top / "a" / "b", cpu__max="400000 100000")
    assert read_quota(own) == 1.5


def test_version_1_beside_an_empty_version_2(process, tmp_path):
    top = tmp_path / "cpu"
    write(top / "a", cpu__cfs_quota_us="200000", cpu__cfs_period_us="50000")
    write(top, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    own = process(
        "4:memory:/m\n2:cpu,cpuacct:/a\n0::/",
        mount(tmp_path / "memory", "cgroup", "rw,memory"),
        mount(top, "cgroup", "rw,cpu,cpuacct"),
        mount(tmp_path / "unified", "cgroup2", "rw"),
    )
    assert read_quota(own) == 4


def test_a_container_sees_its_own_cgroup_as_the_root_of_the_mount(process, tmp_path):
    top = tmp_path / "cpu"
    write(top, cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    own = process("2:cpu:/docker/abc", mount(top, "cgroup", "rw,cpu", root="/docker/abc"))
    assert read_quota(own) == 3


def test_no_limit_and_no_cgroups(process, tmp_path):
    top = tmp_path / "cgroup"
    write(top / "a", cpu__max="max 100000")
    assert read_quota(process("0::/a", mount(top, "cgroup2", "rw"))) is None
    assert read_quota(process("0::/gone", mount(top, "cgroup2", "rw"))) is None
    assert read_quota(tmp_path / "nothing") is None


PROGRAM = "from dist_int8.distributed.cores import count_cores; print(count_cores())"


def count_in(prefix):
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_affinity_counts():
    first = min(os.sched_getaffinity(0))
    assert count_in(["taskset", "-c", str(first)]) == 1
    assert 1 <= count_cores() <= len(os.sched_getaffinity(0))


def test_a_real_quota_counts():
    """In a cgroup of our own, where this machine lets us make one."""
    folders = [Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")]
    parent = next((folder for folder in folders if (folder / "cgroup.procs").exists()), None)
    folder = parent and parent / f"dist_int8_test_{os.getpid()}"
    try:
        folder.mkdir()
        if (folder / "cpu.cfs_quota_us").exists():
            write(folder, cpu__cfs_period_us="100000", cpu__cfs_quota_us="120000")
        else:
            write(folder, cpu__max="120000 100000")
    except (OSError, AttributeError):
        if folder and folder.is_dir():
            folder.rmdir()
        pytest.skip("no cgroup with a CPU controller can be written here")
    try:
        enter = f'echo $$ > {folder}/cgroup.procs; exec "$@"'
        assert count_in(["sh", "-c", enter, "sh"]) == 1
    finally:
        folder.rmdir()
