"""Cuts blocks into contiguous stages: exact dynamic programming over numbers. Pure.

    blocks   0 1 2 3 4 5 6 7
             |---| |---| |-|      one stage per device, in the order of the devices
    device     0     1    2

A stage [start, end) on a device takes time (its blocks, the head if it is the last, the hop to the
next) and bytes (its blocks, the embedding if it is the first, the head if it is the last). The
search minimizes the time of the slowest stage or the sum of all times, or maximizes the KV tokens
that fit on the fullest stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dist_int8.partition.problem import Problem, StageSpan

Objective = Literal["throughput", "latency", "max_kv_tokens"]
Value = Any  # int or tuple of int, compared with <
_Choice = tuple[int, int]  # end of a stage, device of the next one
_Follower = tuple[int, list[tuple[Value | None, int]]]  # hop, (best value, device) by first block


def cut(problem: Problem, objective: Objective) -> list[StageSpan] | None:
    """Finds the best stages that fit on every device; None if there are none.

    The result is optimal in the objective. Ties go to the cut with the most KV tokens for
    throughput, to the fastest for max_kv_tokens, and for latency to the one whose slowest stage is
    fastest.
    """
    if objective == "latency":
        return _search(problem, _Criterion(_total_time, _add))
    first, then = _slowest, _fewest_tokens
    if objective == "max_kv_tokens":
        first, then = then, first
    found = _search(problem, _Criterion(first, max))
    if found is None or (objective == "throughput" and None in problem.rooms):
        return found
    best = max(first(problem, *stage) for stage in _with_hops(problem, found))
    as_good = _Criterion(then, max, accept=lambda *stage: first(problem, *stage) <= best)
    return _search(problem, as_good)


def least_missing(problem: Problem) -> list[StageSpan]:
    """Finds the stages that lack the fewest bytes in total; ties go to the least on one device."""
    found = _search(problem, _Criterion(_missing, _add, unlimited=True))
    assert found is not None
    return found


def fits(problem: Problem) -> bool:
    """Returns whether `cut` would find stages; cheaper, it only tracks where they can end."""
    n = problem.num_blocks
    reached = {0}  # possible ends of the stages on the devices so far
    for device in range(problem.num_devices):
        ends = set(reached) if problem.may_skip else set()
        reach = problem.reach(device)
        for start in reached - {n}:
            ends.update(range(start + 1, reach[start] + 1))
            if not problem.missing(device, start, n):
                ends.add(n)
        reached = ends
    return n in reached


@dataclass(frozen=True)
class _Criterion:
    """What a search minimizes, and which stages it accepts.

    Attributes:
        value: value of (problem, device, start, end, hop); it must grow with `end`.
        combine: value of a stage and of all those after it, together.
        accept: whether (device, start, end, hop) may be used although it fits; None: always.
        unlimited: whether stages may exceed the rooms.
    """

    value: Callable[..., Value]
    combine: Callable[[Value, Value], Value]
    accept: Callable[..., bool] | None = None
    unlimited: bool = False

    def accepts(self, device: int, start: int, end: int, hop: int) -> bool:
        return self.accept is None or self.accept(device, start, end, hop)


def _search(problem: Problem, criterion: _Criterion) -> list[StageSpan] | None:
    """Finds the best stages by dynamic programming from the last device to the first.

    best[d][i] is the least combined value of blocks i.. when a stage begins with block i on device
    d; choice[d][i] is the end of that stage and the device of the next.
    """
    n, num_devices = problem.num_blocks, problem.num_devices
    best: list[list[Value | None]] = [[None] * n for _ in range(num_devices)]
    choice: list[list[_Choice | None]] = [[None] * n for _ in range(num_devices)]
    for device in reversed(range(num_devices)):
        followers = _followers(problem, device, best)
        left = num_devices - 1 - device
        reach = [n - 1] * n if criterion.unlimited else problem.reach(device)
        starts = range(n)
        if not problem.may_skip:
            starts = range(device, n - left) if device else range(1)
        for start in starts:
            ends = range(start + 1, reach[start] + 1 if left else start)
            best[device][start], choice[device][start] = _choose_end(
                problem, criterion, device, start, ends, followers
            )
    device = 0
    if problem.may_skip:
        reachable = [(row[0], d) for d, row in enumerate(best) if row[0] is not None]
        if not reachable:
            return None
        device = min(reachable)[1]
    return _read(choice, device, n)


def _choose_end(
    problem: Problem,
    criterion: _Criterion,
    device: int,
    start: int,
    ends: range,
    followers: list[_Follower],
) -> tuple[Value | None, _Choice | None]:
    """Chooses the end of the stage that begins with `start`, at the last block or among `ends`."""
    n = problem.num_blocks
    value, found, chosen = criterion.value, None, None
    may_end = problem.may_skip or device == problem.num_devices - 1
    if (
        may_end
        and criterion.accepts(device, start, n, 0)
        and (criterion.unlimited or not problem.missing(device, start, n))
    ):
        found, chosen = value(problem, device, start, n, 0), (n, device)
    for end in ends:
        own = value(problem, device, start, end, 0)
        if found is not None and own >= found:
            break  # values grow with `end`: no longer stage can be better
        for hop, table in followers:
            rest, follower = table[end]
            if rest is None or not criterion.accepts(device, start, end, hop):
                continue
            with_hop = value(problem, device, start, end, hop) if hop else own
            total = criterion.combine(with_hop, rest)
            if found is None or total < found:
                found, chosen = total, (end, follower)
    return found, chosen


def _read(
    choice: list[list[_Choice | None]], device: int, num_blocks: int
) -> list[StageSpan] | None:
    stages: list[StageSpan] = []
    start = 0
    while start < num_blocks:
        chosen = choice[device][start]
        if chosen is None:
            return None
        end, follower = chosen
        stages.append(StageSpan(device, start, end))
        start, device = end, follower
    return stages


def _followers(problem: Problem, device: int, best: list[list[Value | None]]) -> list[_Follower]:
    """Lists the best continuation from every block, for each distinct hop from `device`."""
    last = problem.num_devices if problem.may_skip else min(device + 2, problem.num_devices)
    by_hop: dict[int, list[tuple[Value | None, int]]] = {}
    for other in range(device + 1, last):
        hop = problem.hops[device][other]
        table = by_hop.setdefault(hop, [(None, -1)] * problem.num_blocks)
        for block, rest in enumerate(best[other]):
            known = table[block][0]
            if rest is not None and (known is None or rest < known):
                table[block] = (rest, other)
    return sorted(by_hop.items())


def _with_hops(problem: Problem, stages: list[StageSpan]) -> list[tuple[int, int, int, int]]:
    """Lists (device, start, end, hop) of every stage."""
    following: list[StageSpan | None] = [*stages[1:], None]
    return [
        (s.device, s.start, s.end, problem.hops[s.device][after.device] if after else 0)
        for s, after in zip(stages, following, strict=True)
    ]


def _slowest(problem: Problem, device: int, start: int, end: int, hop: int) -> int:
    return problem.time(device, start, end) + hop


def _total_time(problem: Problem, device: int, start: int, end: int, hop: int) -> tuple[int, int]:
    time = problem.time(device, start, end) + hop
    return time, time


def _fewest_tokens(problem: Problem, device: int, start: int, end: int, hop: int) -> int:
    return -problem.tokens(device, start, end)


def _missing(problem: Problem, device: int, start: int, end: int, hop: int) -> tuple[int, int]:
    missing = problem.missing(device, start, end)
    return missing, missing


def _add(stage: tuple[int, int], rest: tuple[int, int]) -> tuple[int, int]:
    return stage[0] + rest[0], max(stage[1], rest[1])
