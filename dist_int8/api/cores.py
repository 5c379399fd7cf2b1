"""The CPU cores of the stages: how many threads each has, and whether on cores of its own."""

from __future__ import annotations

import os

import torch

from dist_int8.api.placement import Placement
from dist_int8.config import Settings
from dist_int8.distributed import rendezvous
from dist_int8.distributed.cores import count_cores


def share_cores(settings: Settings, placement: Placement) -> frozenset[int]:
    """Sets torch's threads and returns the cores that this rank keeps to; empty: any.

    By default the stages on this machine get equal shares of its cores; a single one has torch's
    number of threads, within the affinity mask and the CPU quota unless OMP_NUM_THREADS says
    otherwise. Ranks above 0 are our own processes and stay on their cores; rank 0 may be a user's
    session, which keeps all.

    Raises:
        ValueError: threads_per_stage is above this machine's number of cores, or pin_cores is true
            and there are fewer cores than threads.
    """
    num_threads = settings.threads_per_stage
    if num_threads is not None and num_threads > (os.cpu_count() or num_threads):
        raise ValueError(
            f"load(): threads_per_stage must be at most this machine's {os.cpu_count()} cores, got "
            f"{num_threads}; lower it or leave it out"
        )
    num_threads = num_threads or _default_threads(placement.num_here)
    torch.set_num_threads(num_threads)
    if not _is_pinned(settings, placement.num_here, num_threads):
        return frozenset()
    launched = placement.launched
    first = (0 if launched is None else launched.local_rank) * num_threads
    cores = frozenset(sorted(os.sched_getaffinity(0))[first : first + num_threads])
    if launched is not None and launched.rank:
        rendezvous.stay_on(cores)
    return cores


def divide_cores(num_stages: int, num_threads: int) -> list[frozenset[int]]:
    """Divides this process's cores among its stages, `num_threads` adjacent ones each; 0: any."""
    allowed = sorted(os.sched_getaffinity(0))
    return [
        frozenset(allowed[stage * num_threads : (stage + 1) * num_threads])
        for stage in range(num_stages)
    ]


def _default_threads(num_stages: int) -> int:
    if num_stages > 1:
        return max(1, count_cores() // num_stages)
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return min(torch.get_num_threads(), count_cores())


def _is_pinned(settings: Settings, num_stages: int, num_threads: int) -> bool:
    """Whether ranks keep to cores of their own.

    By default only where that is sure to be good: on a machine that is ours as far as can be seen.
    Others that share its cores would take a pinned rank's, and it could not move to a free one.
    """
    num_cores = len(os.sched_getaffinity(0))
    fits = num_stages * num_threads <= num_cores
    if settings.pin_cores and not fits:
        raise ValueError(
            f"load(): pin_cores must be false for {num_stages} stages of {num_threads} threads on "
            f"{num_cores} cores, got true; leave it out or lower threads_per_stage"
        )
    if settings.pin_cores is not None:
        return settings.pin_cores
    is_whole_machine = num_cores == os.cpu_count() and count_cores() == num_cores
    return num_stages > 1 and fits and is_whole_machine
