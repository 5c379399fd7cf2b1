"""Cuts blocks into contiguous stages: exact dynamic programming over numbers. Pure.

    blocks   0 1 2 3 4 5 6 7
             |---| |---| |-|      one stage a device, in the order of the devices
    device     0     1    2

A stage [start, end) on a device takes time (its blocks, the head if it is the last, its hop to the
next) and bytes (its blocks, the embedding if it is the first, the head if it is the last). What is
minimized is the time of the slowest stage, the sum of all, or minus the least KV tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

Objective = Literal["throughput", "latency", "max_kv_tokens"]
UNLIMITED = 2**62  # KV tokens of a device without a budget
Value = Any  # int or tuple of int, compared with <


@dataclass(frozen=True)
class BlockRange:
    """Blocks [start, end) on device number `device`."""

    device: int
    start: int
    end: int


class Problem:
    """What the search knows: plain numbers, a list an index of a block or a device.

    Args:
        times: of block i on device d, times[d][i].
        last_times: of the head, by device.
        hops: from device d to device e > d, hops[d][e].
        block_bytes: parameters of each block.
        kv_bytes: KV cache of each block for one token.
        first_bytes, last_bytes: what the first and the last stage hold on top.
        shared_bytes: what a stage that is both saves of them.
        rooms: bytes of each device for all of this; None: unlimited.
        num_tokens: KV tokens that must fit on every stage.
        may_skip: devices may be left out; otherwise each gets a stage.
    """

    def __init__(
        self,
        *,
        times: Sequence[Sequence[int]],
        last_times: Sequence[int],
        hops: Sequence[Sequence[int]],
        block_bytes: Sequence[int],
        kv_bytes: Sequence[int],
        first_bytes: int,
        last_bytes: int,
        shared_bytes: int,
        rooms: Sequence[int | None],
        num_tokens: int,
        may_skip: bool = False,
    ) -> None:
        self.num_blocks = len(block_bytes)
        self.num_devices = len(rooms)
        self.last_times = last_times
        self.hops = hops
        self.first_bytes = first_bytes
        self.last_bytes = last_bytes
        self.shared_bytes = shared_bytes
        self.rooms = rooms
        self.num_tokens = num_tokens
        self.may_skip = may_skip
        self._time_sums = [list(accumulate(row, initial=0)) for row in times]
        self._byte_sums = list(accumulate(block_bytes, initial=0))
        self._kv_sums = list(accumulate(kv_bytes, initial=0))

    def time(self, device: int, start: int, end: int) -> int:
        """Time of a stage without its hop."""
        sums = self._time_sums[device]
        head = self.last_times[device] if end == self.num_blocks else 0
        return sums[end] - sums[start] + head

    def weight_bytes(self, start: int, end: int) -> int:
        """Bytes of a stage without its KV cache."""
        total = self._byte_sums[end] - self._byte_sums[start]
        first, last = start == 0, end == self.num_blocks
        total += self.first_bytes if first else 0
        total += self.last_bytes if last else 0
        return total - (self.shared_bytes if first and last else 0)

    def tokens(self, device: int, start: int, end: int) -> int:
        """KV tokens that fit beside the stage; negative if not even its parameters do."""
        room = self.rooms[device]
        if room is None:
            return UNLIMITED
        return (room - self.weight_bytes(start, end)) // (self._kv_sums[end] - self._kv_sums[start])

    def missing(self, device: int, start: int, end: int) -> int:
        """Bytes that the stage lacks for the KV tokens asked for."""
        room = self.rooms[device]
        if room is None:
            return 0
        kv_bytes = self.num_tokens * (self._kv_sums[end] - self._kv_sums[start])
        return max(0, self.weight_bytes(start, end) + kv_bytes - room)

    def reach(self, device: int) -> list[int]:
        """For each first block the furthest end, below num_blocks, within the room.

        Both ends only move on: a stage within its room stays so without its first or last block.
        """
        ends, end = [], 0
        for start in range(self.num_blocks):
            end = max(end, start)
            while end < self.num_blocks - 1 and not self.missing(device, start, end + 1):
                end += 1
            ends.append(end)
        return ends


def cut(problem: Problem, objective: Objective) -> list[BlockRange] | None:
    """The best stages within every room, or None if there are none.

    Exact in the objective. Among equally good cuts: for throughput the one with the most KV tokens,
    for max_kv_tokens the fastest, for latency the one whose slowest stage is fastest.
    """
    if objective == "latency":
        return _search(problem, _total_time, _add)
    first, then = _slowest, _fewest_tokens
    if objective == "max_kv_tokens":
        first, then = then, first
    found = _search(problem, first, max)
    if found is None or (objective == "throughput" and None in problem.rooms):
        return found
    best = max(first(problem, *stage) for stage in _with_hops(problem, found))
    return _search(problem, then, max, lambda *stage: first(problem, *stage) <= best)


def least_missing(problem: Problem) -> list[BlockRange]:
    """The stages that lack the fewest bytes in all; among those, the least on one device."""
    found = _search(problem, _missing, _add, unlimited=True)
    assert found is not None
    return found


def fits(problem: Problem) -> bool:
    """Whether `cut` finds anything: where the stages can end, device by device."""
    n = problem.num_blocks
    reached = {0}  # ends of what the devices so far can hold
    for device in range(problem.num_devices):
        ends = set(reached) if problem.may_skip else set()
        reach = problem.reach(device)
        for start in reached - {n}:
            ends.update(range(start + 1, reach[start] + 1))
            if not problem.missing(device, start, n):
                ends.add(n)
        reached = ends
    return n in reached


def _search(
    problem: Problem,
    value: Callable[..., Value],
    combine: Callable[[Value, Value], Value],
    good_enough: Callable[..., bool] | None = None,
    unlimited: bool = False,
) -> list[BlockRange] | None:
    """Dynamic programming from the last device to the first.

    best[d][i] is the least combined value of blocks i.. when a stage begins with block i on device
    d. `value` of (problem, device, start, end, hop) grows with `end`, so a stage that alone is no
    better than what was found ends the loop. `good_enough` of (device, start, end, hop) refuses
    stages that the rooms allow; `unlimited` ignores the rooms.
    """
    n, num_devices = problem.num_blocks, problem.num_devices
    best: list[list[Value | None]] = [[None] * n for _ in range(num_devices)]
    choice: list[list[tuple[int, int] | None]] = [[None] * n for _ in range(num_devices)]
    for device in reversed(range(num_devices)):
        followers = _followers(problem, device, best)
        left = num_devices - 1 - device
        reach = [n - 1] * n if unlimited else problem.reach(device)
        starts = range(n)
        if not problem.may_skip:
            starts = range(device, n - left) if device else range(1)
        for start in starts:
            found: Value | None = None
            chosen = None
            may_end = problem.may_skip or not left
            if may_end and good_enough is not None:
                may_end = good_enough(device, start, n, 0)
            if may_end and (unlimited or not problem.missing(device, start, n)):
                found, chosen = value(problem, device, start, n, 0), (n, device)
            for end in range(start + 1, reach[start] + 1 if left else start):
                own = value(problem, device, start, end, 0)
                if found is not None and own >= found:
                    break
                for hop, table in followers:
                    rest, follower = table[end]
                    if rest is None:
                        continue
                    if good_enough is not None and not good_enough(device, start, end, hop):
                        continue
                    with_hop = value(problem, device, start, end, hop) if hop else own
                    total = combine(with_hop, rest)
                    if found is None or total < found:
                        found, chosen = total, (end, follower)
            best[device][start], choice[device][start] = found, chosen
    device = 0
    if problem.may_skip:
        reachable = [(row[0], d) for d, row in enumerate(best) if row[0] is not None]
        if not reachable:
            return None
        device = min(reachable)[1]
    return _read(choice, device, n)


def _read(
    choice: list[list[tuple[int, int] | None]], device: int, num_blocks: int
) -> list[BlockRange] | None:
    stages: list[BlockRange] = []
    start = 0
    while start < num_blocks:
        chosen = choice[device][start]
        if chosen is None:
            return None
        end, follower = chosen
        stages.append(BlockRange(device, start, end))
        start, device = end, follower
    return stages


def _followers(
    problem: Problem, device: int, best: list[list[Value | None]]
) -> list[tuple[int, list[tuple[Value | None, int]]]]:
    """(hop, best continuation from every block) for each different hop from `device`."""
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


def _with_hops(problem: Problem, stages: list[BlockRange]) -> list[tuple[int, int, int, int]]:
    """(device, start, end, hop) of every stage."""
    following: list[BlockRange | None] = [*stages[1:], None]
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
