"""The input and output of the search for stages: plain numbers, without models or devices. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

UNLIMITED = 2**62  # KV tokens of a device without a budget


@dataclass(frozen=True)
class StageSpan:
    """Blocks [start, end) on one device.

    Attributes:
        device: index of the device.
        start: first block.
        end: block after the last one.
    """

    device: int
    start: int
    end: int


@dataclass(frozen=True)
class Problem:
    """The input of the search: plain numbers, in lists indexed by block or device.

    Attributes:
        times: time of block i on device d, times[d][i].
        last_times: time of the head on each device.
        hops: time of a hop from device d to device e > d, hops[d][e].
        block_bytes: bytes of each block's parameters.
        kv_bytes: bytes of each block's KV cache for one token.
        first_bytes: bytes that the first stage holds besides its blocks.
        last_bytes: bytes that the last stage holds besides its blocks.
        shared_bytes: bytes saved by a stage that is both first and last.
        rooms: bytes available on each device for all of this; None: unlimited.
        num_tokens: number of KV tokens that must fit on every stage.
        may_skip: whether devices may stay unused; otherwise each gets a stage.
    """

    times: Sequence[Sequence[int]]
    last_times: Sequence[int]
    hops: Sequence[Sequence[int]]
    block_bytes: Sequence[int]
    kv_bytes: Sequence[int]
    first_bytes: int
    last_bytes: int
    shared_bytes: int
    rooms: Sequence[int | None]
    num_tokens: int
    may_skip: bool = False

    @property
    def num_blocks(self) -> int:
        return len(self.block_bytes)

    @property
    def num_devices(self) -> int:
        return len(self.rooms)

    @cached_property
    def _time_sums(self) -> list[list[int]]:
        return [list(accumulate(row, initial=0)) for row in self.times]

    @cached_property
    def _byte_sums(self) -> list[int]:
        return list(accumulate(self.block_bytes, initial=0))

    @cached_property
    def _kv_sums(self) -> list[int]:
        return list(accumulate(self.kv_bytes, initial=0))

    def time(self, device: int, start: int, end: int) -> int:
        """Computes the time of a stage without its hop."""
        sums = self._time_sums[device]
        head = self.last_times[device] if end == self.num_blocks else 0
        return sums[end] - sums[start] + head

    def weight_bytes(self, start: int, end: int) -> int:
        """Computes the bytes of a stage without its KV cache."""
        total = self._byte_sums[end] - self._byte_sums[start]
        first, last = start == 0, end == self.num_blocks
        total += self.first_bytes if first else 0
        total += self.last_bytes if last else 0
        return total - (self.shared_bytes if first and last else 0)

    def tokens(self, device: int, start: int, end: int) -> int:
        """Counts the KV tokens that fit beside the parameters; negative if those do not fit."""
        room = self.rooms[device]
        if room is None:
            return UNLIMITED
        return (room - self.weight_bytes(start, end)) // (self._kv_sums[end] - self._kv_sums[start])

    def missing(self, device: int, start: int, end: int) -> int:
        """Computes how many bytes the stage lacks to hold `num_tokens` KV tokens."""
        room = self.rooms[device]
        if room is None:
            return 0
        kv_bytes = self.num_tokens * (self._kv_sums[end] - self._kv_sums[start])
        return max(0, self.weight_bytes(start, end) + kv_bytes - room)

    def reach(self, device: int) -> list[int]:
        """Returns, for each first block, the furthest end below num_blocks that still fits.

        Both ends only move forward: a stage that fits still fits without its first or last block.
        """
        ends, end = [], 0
        for start in range(self.num_blocks):
            end = max(end, start)
            while end < self.num_blocks - 1 and not self.missing(device, start, end + 1):
                end += 1
            ends.append(end)
        return ends
