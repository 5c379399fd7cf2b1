"""`Segments`: which tokens of which sequences a micro-batch has, for the host and for the device.

Kernels on CPUs read rows of (slot, start, count). On a GPU that would take a wait or a launch per
row: there every token has a place of its own, and prompts are known by where they end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int32]


class Prompts(NamedTuple):
    """The segments that are not single tokens of sequences that decode, behind all of those.

    What the host needs of them is worked out once, for all blocks of a stage.

    Attributes:
        rows: int32 [P, 3] on the CPU, (slot, start, count).
        sources: (slot, tokens so far) of each, where one does not begin its sequence; else none.
        max_queries: most tokens of a segment.
        max_keys: most tokens of a sequence so far.
        query_ends: int32 [P + 1] on the device: 0, then tokens up to the end of each segment.
        key_ends: int32 [P + 1] on the device: the same of all tokens of their sequences so far.
    """

    rows: Tensor
    sources: list[tuple[int, int]]
    max_queries: int
    max_keys: int
    query_ends: Tensor
    key_ends: Tensor

    @classmethod
    def of(cls, rows: Ints, query_ends: Tensor, key_ends: Tensor) -> Prompts:
        """Makes the prompts of rows [P, 3] on the host and their ends on the device."""
        slots, starts, counts = rows.T
        ends = starts + counts
        sources = list(zip(slots.tolist(), ends.tolist(), strict=True)) if starts.any() else []
        sizes = (int(counts.max()), int(ends.max()))
        return cls(torch.from_numpy(rows), sources, *sizes, query_ends, key_ends)


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of one micro-batch: T tokens of B sequences.

    Attributes:
        rows: int32 [B, 3] on the CPU, (slot, start, count): the next `count` tokens are those at
            positions start.. of that slot.
        places: int32 [T, 3] on the device, (slot, position, 1) of every token.
        num_decodes: how many of the first segments have a single token.
        prompts: the other ones; None if there is none.
    """

    rows: Tensor
    places: Tensor
    num_decodes: int
    prompts: Prompts | None

    @classmethod
    def of(cls, rows: Tensor, device: torch.device | str = "cpu") -> Segments:
        """Makes the segments of int32 rows [B, 3] on the CPU, by one copy to the device."""
        parts, make = cls.parts_of(rows.numpy())
        return make(upload(parts, torch.device(device)))

    @classmethod
    def parts_of(cls, rows: Ints) -> tuple[list[Ints], Callable[[list[Tensor]], Segments]]:
        """Lists what goes to the device, and returns what makes the segments of it once there."""
        counts = rows[:, 2]
        several = (counts != 1).nonzero()[0]
        num_decodes = int(several[0]) if len(several) else len(rows)
        prompts = rows[num_decodes:]
        parts = [list_places(rows)]
        if len(prompts):
            parts += [_sum_up(prompts[:, 2]), _sum_up(prompts[:, 1] + prompts[:, 2])]

        def make(there: list[Tensor]) -> Segments:
            ends = Prompts.of(prompts, there[1], there[2]) if len(prompts) else None
            places = there[0].view(-1, 3)
            on_host = places if ends is None and places.is_cpu else torch.from_numpy(rows)
            return cls(on_host, places, num_decodes, ends)

        return parts, make


def list_places(rows: Ints) -> Ints:
    """Rows (slot, position, 1) of every token of rows (slot, start, count)."""
    counts = rows[:, 2]
    if (counts == 1).all():
        return rows
    firsts = counts.cumsum() - counts  # row of each segment's first token
    places = np.repeat(rows, counts, axis=0)
    places[:, 1] += np.arange(len(places), dtype=np.int32) - np.repeat(firsts, counts)
    places[:, 2] = 1
    return places


def _sum_up(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int32), counts.cumsum(dtype=np.int32)])


def upload(parts: list[Ints], device: torch.device) -> list[Tensor]:
    """The parts as flat int32 tensors on the device; on a GPU by one copy, without a wait.

    The pinned memory it is made from goes back to torch's cache, which gives it away again only
    once the copy is done.
    """
    flat = [part.ravel() for part in parts]
    if device.type == "cpu":
        return [torch.from_numpy(part) for part in flat]
    whole = torch.from_numpy(np.concatenate(flat))
    if device.type == "cuda":
        whole = whole.pin_memory()
    return list(whole.to(device, non_blocking=True).split([part.size for part in flat]))
