"""Chooses the stages: contiguous blocks, the slowest stage as fast as can be. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from dist_int8.partition import memory

FLOAT32 = memory.Formats(int8=False, float_size=4, vocab_size=4)
COUNT = memory.Formats(int8=False, float_size=1, vocab_size=1)  # one "byte" a parameter


@dataclass(frozen=True)
class StagePlan:
    """What one rank holds.

    Attributes:
        rank: rank and number of the stage.
        device: "cpu" or "cuda:N".
        first_block, last_block: blocks of the stage, both inclusive.
        weight_bytes: parameters as held.
        float_bytes: the same parameters in fp32.
        kv_bytes: KV cache of all slots at full length.
        budget: bytes that the settings allow here; None where they say nothing.
    """

    rank: int
    device: str
    first_block: int
    last_block: int
    weight_bytes: int
    float_bytes: int
    kv_bytes: int
    budget: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes of this stage: parameters as held."""
        return self.weight_bytes

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.last_block + 1)


@dataclass(frozen=True)
class Plan:
    """The stages of a model, in order."""

    stages: tuple[StagePlan, ...]
    num_blocks: int

    def table(self) -> str:
        """The plan as text, a line a stage."""
        rows = [("stage", "device", "blocks", "weights", "in fp32", "KV cache", "budget")]
        for stage in self.stages:
            rows.append(
                (
                    str(stage.rank),
                    stage.device,
                    f"{stage.first_block}-{stage.last_block}",
                    format_bytes(stage.weight_bytes),
                    format_bytes(stage.float_bytes),
                    format_bytes(stage.kv_bytes),
                    "-" if stage.budget is None else format_bytes(stage.budget),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )


def format_bytes(num_bytes: int) -> str:
    """1610612736 as "1.50 GiB"."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def split_blocks(costs: Sequence[int], last_cost: int, num_stages: int) -> list[range]:
    """Contiguous, non-empty ranges of blocks whose largest sum of costs is the least possible.

    Exact: dynamic programming over (blocks left, stages left). Among equals the earlier stage is
    the shorter one.

    Args:
        costs: cost of each block, here the bytes that a decode step reads.
        last_cost: what the last stage has on top (the head).
        num_stages: 1 to len(costs).
    """
    assert 1 <= num_stages <= len(costs)
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    num_blocks = len(costs)

    @cache
    def best(start: int, stages: int) -> tuple[int, int]:
        """(largest cost, end of the first stage) for blocks from `start` on `stages` stages."""
        if stages == 1:
            return sums[num_blocks] - sums[start] + last_cost, num_blocks
        return min(
            (max(sums[end] - sums[start], best(end, stages - 1)[0]), end)
            for end in range(start + 1, num_blocks - stages + 2)
        )

    ranges, start = [], 0
    for stages in range(num_stages, 0, -1):
        end = best(start, stages)[1]
        ranges.append(range(start, end))
        start = end
    return ranges


def plan_stages(
    model: memory.Model,
    devices: Sequence[str],
    formats: memory.Formats,
    *,
    num_slots: int,
    max_tokens: int,
    budgets: Sequence[int | None] | None = None,
) -> Plan:
    """One stage a device, balanced by what a decode step costs (blocks and head).

    GPUs wait for memory: there the cost is the bytes of the weights that a step reads. CPUs wait
    for arithmetic from a few rows on, and an int8 product with its outliers takes them about as
    long as a widened 16-bit one: there the cost is the number of weights. The embedding counts as
    held but not as read: a step looks up a few of its rows.

    Raises:
        ValueError: more stages than blocks, or a stage over its budget.
    """
    num_stages, num_blocks = len(devices), len(model.blocks)
    if num_stages > num_blocks:
        raise ValueError(
            f"plan: stages must be at most the model's {num_blocks} blocks, got {num_stages}; "
            f"use {num_blocks} or fewer stages"
        )
    read = COUNT if devices[0] == "cpu" else formats
    costs = [memory.block_bytes(block, read) for block in model.blocks]
    ranges = split_blocks(costs, memory.head_bytes(model, read), num_stages)
    stages = []
    for rank, (device, blocks) in enumerate(zip(devices, ranges, strict=True)):
        kv_bytes = (
            num_slots
            * max_tokens
            * sum(memory.kv_bytes_per_token(model.blocks[i], formats.float_size) for i in blocks)
        )
        first, last = rank == 0, rank == num_stages - 1
        stage = StagePlan(
            rank=rank,
            device=device,
            first_block=blocks.start,
            last_block=blocks.stop - 1,
            weight_bytes=_weight_bytes(model, blocks, first, last, formats),
            float_bytes=_weight_bytes(model, blocks, first, last, FLOAT32),
            kv_bytes=kv_bytes,
            budget=budgets[rank] if budgets else None,
        )
        needed = stage.weight_bytes + stage.kv_bytes
        if stage.budget is not None and needed > stage.budget:
            raise ValueError(
                f"plan: stage {rank} on {device} must fit {format_bytes(stage.budget)}, got "
                f"{format_bytes(stage.weight_bytes)} of weights and {format_bytes(kv_bytes)} of KV "
                f"cache, {format_bytes(needed - stage.budget)} too much; lower max_sequences "
                f"({num_slots}) or max_tokens ({max_tokens}), or add a stage"
            )
        stages.append(stage)
    return Plan(tuple(stages), num_blocks)


def _weight_bytes(
    model: memory.Model, blocks: range, first: bool, last: bool, formats: memory.Formats
) -> int:
    total = sum(memory.block_bytes(model.blocks[i], formats) for i in blocks)
    if first:
        total += memory.embedding_bytes(model, formats)
    if last:
        total += memory.head_bytes(model, formats)
    if first and last and model.tied_head:
        total -= model.vocab_size * model.embedding_size * formats.vocab_size
    return total
