"""The order of work as data: which stage runs which micro-batch at which clock. Pure Python.

An action prints as `<stage><kind><micro-batch>`: `1P0` is stage 1 running a prefill chunk of
micro-batch 0, `0D2` stage 0 running a decode step of micro-batch 2 (the notation of
torch.distributed.pipelining). Two stages, two micro-batches, one prefill chunk, two decode steps:

    clock     0    1    2    3    4    5    6
    stage 0  0P0  0P1  0D0  0D1  0D0  0D1
    stage 1       1P0  1P1  1D0  1D1  1D0  1D1

A micro-batch's next decode step starts on stage 0 once its tokens came back from the last stage,
so with at least as many micro-batches as stages every stage is busy at every clock between fill
and drain.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

PREFILL = "P"
DECODE = "D"


@dataclass(frozen=True)
class Action:
    """One stage running one micro-batch once."""

    stage: int
    kind: str  # PREFILL or DECODE
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


def in_flight_limit(num_stages: int, num_micro_batches: int) -> int:
    """Returns the maximum number of micro-batches in flight: one per stage and one waiting.

    More would only queue in front of a stage; fewer would leave a stage idle while a result
    travels back: P + 1 for P stages keeps them busy in practice.
    """
    return 1 if num_stages == 1 else max(num_micro_batches, num_stages + 1)


def prefill_chunk(num_prompt_tokens: int, num_stages: int, smallest: int, largest: int) -> int:
    """Returns the prompt tokens per micro-batch when `num_prompt_tokens` are to be prefilled.

    n chunks keep P stages busy n / (n + P - 1) of the time (GPipe's bubble, Huang et al. 2019): 4 P
    chunks lose at most about a fifth. Chunks are never shorter than `smallest`, below which a chunk
    takes as long as a longer one. One stage gains nothing from cutting.
    """
    if num_stages == 1:
        return largest
    return max(min(smallest, largest), min(largest, -(-num_prompt_tokens // (4 * num_stages))))


def build(
    num_stages: int, num_micro_batches: int, num_prefill_chunks: int = 1, num_decode_steps: int = 2
) -> list[list[Action | None]]:
    """Builds the grid [clock][stage] of actions, None for an idle stage; an action takes one clock.

    Stage 0 takes the ready micro-batch that has waited longest. A prefill chunk is ready as soon as
    the previous chunk was submitted, and goes before other prefills but after decode steps; a
    decode step is ready when the last stage has finished the previous one.
    """
    for name, value, least in (
        ("num_stages", num_stages, 1),
        ("num_micro_batches", num_micro_batches, 1),
        ("num_prefill_chunks", num_prefill_chunks, 1),
        ("num_decode_steps", num_decode_steps, 0),
    ):
        if value < least:
            raise ValueError(f"schedule: {name} must be at least {least}, got {value}")
    num_steps = num_prefill_chunks + num_decode_steps
    limit = in_flight_limit(num_stages, num_micro_batches)
    done = [0] * num_micro_batches
    ready = deque(range(num_micro_batches))
    in_flight = [0] * num_micro_batches
    row: list[Action | None] = [None] * num_stages
    grid: list[list[Action | None]] = []
    while True:
        finished = row[-1]  # what the last stage ran at the clock before
        if finished is not None:
            micro_batch = finished.micro_batch
            in_flight[micro_batch] -= 1
            if not in_flight[micro_batch] and num_prefill_chunks <= done[micro_batch] < num_steps:
                ready.append(micro_batch)
        first: Action | None = None
        if ready and sum(in_flight) < limit:
            micro_batch = ready.popleft()
            kind = PREFILL if done[micro_batch] < num_prefill_chunks else DECODE
            first = Action(0, kind, micro_batch)
            done[micro_batch] += 1
            in_flight[micro_batch] += 1
            if done[micro_batch] < num_prefill_chunks:
                waits = any(done[other] >= num_prefill_chunks for other in ready)
                (ready.append if waits else ready.appendleft)(micro_batch)
        moved = [Action(a.stage + 1, a.kind, a.micro_batch) if a else None for a in row[:-1]]
        row = [first, *moved]
        if not any(row):
            return grid
        grid.append(row)


def draw(grid: list[list[Action | None]]) -> str:
    """Draws the grid as text: one line per stage, one column per clock."""
    num_stages = len(grid[0])
    width = max(len(str(action)) for row in grid for action in row if action) + 2
    lines = ["clock   " + "".join(f"{clock:>{width}}" for clock in range(len(grid)))]
    for stage in range(num_stages):
        cells = "".join(f"{str(row[stage]) if row[stage] else '':>{width}}" for row in grid)
        lines.append(f"stage {stage:<2}{cells}".rstrip())
    return "\n".join(lines)


def utilisation(grid: list[list[Action | None]]) -> list[float]:
    """Returns the share of clocks in which each stage is busy, in [0, 1]."""
    return [sum(row[s] is not None for row in grid) / len(grid) for s in range(len(grid[0]))]
