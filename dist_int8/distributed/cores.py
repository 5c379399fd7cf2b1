"""How many cores this process may keep busy: its affinity mask, and the CPU limit of its container.

https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files (cpu.max) and
https://docs.kernel.org/scheduler/sched-bwc.html (version 1, cpu.cfs_quota_us)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROCESS = Path("/proc/self")


def count_cores() -> int:
    """Number of cores that this process may keep busy, 1 at least."""
    allowed = len(os.sched_getaffinity(0))
    quota = read_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def read_quota(process: Path = PROCESS) -> float | None:
    """Returns the least quota of this process's cgroup and those above it, in cores, or None.

    Args:
        process: folder with the process's `cgroup` and `mountinfo`.
    """
    quotas: list[float] = []
    try:
        for folder, top in _find_cgroups(process):
            while folder.is_relative_to(top):
                quotas += _quotas_of(folder)
                folder = folder.parent
    except OSError:  # no cgroups here
        return None
    return min(quotas, default=None)


def _quotas_of(folder: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):  # not there, "max" in version 2
        numbers = (folder / "cpu.max").read_text().split()
        yield int(numbers[0]) / int(numbers[1])
    with suppress(OSError, ValueError):
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        if quota > 0:  # -1: no limit
            yield quota / int((folder / "cpu.cfs_period_us").read_text())


def _find_cgroups(process: Path) -> Iterator[tuple[Path, Path]]:
    """The folders of this process's cgroups with a CPU controller, each with its mount point."""
    mounts = list(_read_mounts(process))
    for line in (process / "cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        is_version_2 = number == "0"
        if not is_version_2 and "cpu" not in controllers.split(","):
            continue
        for kind, root, point, options in mounts:
            if kind == ("cgroup2" if is_version_2 else "cgroup") and (
                is_version_2 or "cpu" in options
            ):
                # in a container the mount may show only what is below the container's own cgroup
                inside = path.removeprefix(root) if root != "/" else path
                yield point / inside.lstrip("/"), point


def _read_mounts(process: Path) -> Iterator[tuple[str, str, Path, list[str]]]:
    """Type, root, mount point and options of every mounted cgroup hierarchy."""
    for line in (process / "mountinfo").read_text().splitlines():
        place, _, what = line.partition(" - ")
        kind, _, options = what.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            root, point = place.split(" ")[3:5]
            yield kind, root, Path(point.replace("\\040", " ")), options.split(",")
