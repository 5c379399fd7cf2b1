"""How fast a pipeline is before it runs. Pure Python; imports nothing of ours.

Decode in steady state: each lane's micro-batch goes through the stages, its tokens travel back to
stage 0, and it starts again. A stage takes what reached it first, one micro-batch at a time.

    stage 0  |0000|1111|2222|0000|1111|          stages of 4 and 5, hop 1, three lanes:
    stage 1       |00000|11111|22222|00000|      a micro-batch every 5, the slowest stage busy

With m lanes over P stages of equal time t and hop h a round takes max(m t, P (t + h)): full when
m >= P (1 + h / t), which is P + 1 in practice. What splitting costs is not here but in t: below the
knee of memory bandwidth a micro-batch of half the rows takes as long as a whole one, and a pipeline
then gains nothing from cutting one batch in two.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Simulation:
    """What a run would show.

    Attributes:
        micro_batches_per_s: in steady state, over all lanes.
        utilisation: share of the time each stage works, in [0, 1].
        latency_s: from the start of a micro-batch on stage 0 until its tokens are back there.
    """

    micro_batches_per_s: float
    utilisation: tuple[float, ...]
    latency_s: float


def simulate(
    stage_s: Sequence[float],
    num_lanes: int,
    hop_s: float = 0.0,
    host_s: float = 0.0,
    num_rounds: int = 64,
) -> Simulation:
    """Runs every lane `num_rounds` times; the first quarter fills the pipeline and does not count.

    Args:
        stage_s: seconds that each stage works on a micro-batch.
        num_lanes: micro-batches in flight.
        hop_s: seconds from the end on one stage until the next may start, the way back included.
            With a single stage there is none.
        host_s: seconds that rank 0 works beside its stage, for every micro-batch.

    Raises:
        ValueError: no stage, no lane, or a negative time.
    """
    if not stage_s or num_lanes < 1 or num_rounds < 4:
        raise ValueError(
            "simulate: stage_s, num_lanes and num_rounds must be at least 1, 1 and 4, got "
            f"{len(stage_s)}, {num_lanes} and {num_rounds}; give a stage and a lane at least"
        )
    if min(*stage_s, hop_s, host_s) < 0:
        raise ValueError(
            f"simulate: times must not be negative, got {list(stage_s)}, {hop_s} and {host_s}; "
            "give seconds"
        )
    hop_s = hop_s if len(stage_s) > 1 else 0.0
    work = [stage_s[0] + host_s, *stage_s[1:]]
    free = [0.0] * len(work)  # when each stage is done with what it took so far
    ready = [(0.0, lane) for lane in range(num_lanes)]
    warm, total = num_lanes * (num_rounds // 4), num_lanes * num_rounds
    begin = end = latency = 0.0
    for count in range(total):
        arrival, lane = heapq.heappop(ready)
        started = max(arrival, free[0])
        # Every stage sees the micro-batches in the order in which stage 0 took them.
        for stage, seconds in enumerate(work):
            arrival = max(arrival, free[stage]) + seconds
            free[stage] = arrival
            arrival += hop_s
        heapq.heappush(ready, (arrival, lane))
        if count == warm - 1:
            begin = free[-1]
        latency, end = arrival - started, free[-1]
    per_micro_batch = (end - begin) / (total - warm)
    rate = 1.0 / per_micro_batch if per_micro_batch > 0 else float("inf")
    return Simulation(rate, tuple(min(1.0, rate * seconds) for seconds in work), latency)
