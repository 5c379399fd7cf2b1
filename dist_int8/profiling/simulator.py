"""How fast a pipeline is before it runs. Pure Python; imports nothing of ours.

Decode in steady state: each lane's micro-batch goes through the stages, its tokens travel back to
stage 0, and it starts again. A stage takes what reached it first, one micro-batch at a time.

    stage 0  |0000|1111|2222|0000|1111|          stages of 4 and 5, hop 1, three lanes:
    stage 1       |00000|11111|22222|00000|      a micro-batch every 5, the slowest stage busy

With m lanes over P stages of equal time t and hop h a round takes max(m t, P (t + h)): full when
m >= P (1 + h / t). But t itself depends on m. With a to read a stage's weights and b for a row, S
sequences in m lanes have t = a + b S / m, so a round takes max(m a + b S, P (a + b S / m + h)):

- One lane more than stages pays where P h > a, where the hops around the ring take longer than
  reading the weights of a stage once. On one machine they rarely do, over a slow network they do.
- Below the knee of memory bandwidth b is next to nothing. Then one lane is as fast as any number,
  and a pipeline gains nothing from cutting one batch in two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Slice:
    """One stage at work on one lane's micro-batch, seconds from the start."""

    stage: int
    lane: int
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What a run would show.

    Attributes:
        micro_batches_per_s: in steady state, over all lanes.
        utilisation: share of the time each stage works, in [0, 1].
        latency_s: from the start of a micro-batch on stage 0 until its tokens are back there, mean.
        slices: the whole run, in the order of their ends.
    """

    micro_batches_per_s: float
    utilisation: tuple[float, ...]
    latency_s: float
    slices: tuple[Slice, ...]


@dataclass
class _Job:
    lane: int
    work: float  # seconds left on a stage that has all it needs
    start: float


def simulate(
    lanes: Sequence[Sequence[float]],
    hop_s: float | Sequence[float] = 0.0,
    host_s: float = 0.0,
    speeds: Sequence[float] = (1.0,),
    num_rounds: int = 32,
    turnaround_s: float | Sequence[float] = 0.0,
) -> Simulation:
    """Runs every lane again and again; the first quarter fills the pipeline and does not count.

    Args:
        lanes: for each lane the seconds that each stage works on its micro-batch, alone.
        hop_s: seconds from the end on one stage until the next may start, the way back included.
            With a single stage there is none. Several: while 0, 1, ... stages are at work, for
            stages that share cores, where a message waits for its turn; the last holds for more.
        host_s: seconds that rank 0 works beside its stage, for every micro-batch.
        speeds: how fast each of k stages is that work at the same time, against one alone; the
            last holds for more. Three stages of one thread on two cores: (1, 1, 2 / 3).
        num_rounds: of every lane.
        turnaround_s: seconds that pass on a stage from the end of a micro-batch to the start of the
            next one even where that one waits: sending the one, unpacking the other. Stages that
            share cores slow that too. Of every stage, or one for all.

    Raises:
        ValueError: no lane, no stage, lanes that differ in stages, or times that make no sense.
    """
    hops = [hop_s] if isinstance(hop_s, int | float) else list(hop_s)
    num_stages, num_lanes = len(lanes[0]) if lanes else 0, len(lanes)
    if isinstance(turnaround_s, int | float):
        turnarounds = [float(turnaround_s)] * num_stages
    else:
        turnarounds = list(turnaround_s)
    _check(lanes, [*hops, host_s, *turnarounds], speeds, num_rounds)
    if len(turnarounds) != num_stages:
        raise ValueError(
            f"simulate: turnaround_s must be one time, or one of each of {num_stages} stages, got "
            f"{len(turnarounds)}; give {num_stages}"
        )
    hops = hops if num_stages > 1 else [0.0]
    queues: list[deque[tuple[float, int]]] = [deque() for _ in range(num_stages)]
    queues[0].extend((0.0, lane) for lane in range(num_lanes))
    jobs: list[_Job | None] = [None] * num_stages
    turning = [0.0] * num_stages  # seconds of work left before each stage takes the next one
    begun = [0.0] * num_lanes  # when each lane's micro-batch started on stage 0
    slices: list[Slice] = []
    latencies: list[float] = []
    ends: list[float] = []  # on the last stage
    now = 0.0
    while len(ends) < num_lanes * num_rounds:
        for stage, queue in enumerate(queues):
            if jobs[stage] is None and not turning[stage] and queue and queue[0][0] <= now:
                lane = queue.popleft()[1]
                jobs[stage] = _Job(lane, lanes[lane][stage] + (host_s if stage == 0 else 0.0), now)
                if stage == 0:
                    begun[lane] = now
        active = [job for job in jobs if job is not None]
        left = [*(job.work for job in active), *filter(None, turning)]
        speed = speeds[min(len(left), len(speeds)) - 1]
        arrivals = [
            queue[0][0]
            for queue, job, turn in zip(queues, jobs, turning, strict=True)
            if queue and job is None and not turn
        ]
        following = min([*arrivals, *(now + work / speed for work in left)])
        done_s, now = (following - now) * speed, following
        for job in active:
            job.work -= done_s
        turning = [turn - done_s if turn - done_s > _least(now) else 0.0 for turn in turning]
        for stage, done in enumerate(jobs):
            if done is None or done.work > _least(now):
                continue
            jobs[stage] = None
            turning[stage] = turnarounds[stage]
            slices.append(Slice(stage, done.lane, done.start, now))
            at_work = sum(
                job is not None or bool(queue and queue[0][0] <= now)
                for job, queue in zip(jobs, queues, strict=True)
            )
            arrival = now + hops[min(at_work, len(hops) - 1)]
            queue = queues[(stage + 1) % num_stages]
            queue.append((max(arrival, queue[-1][0]) if queue else arrival, done.lane))
            if stage == num_stages - 1:
                ends.append(now)
                latencies.append(arrival - begun[done.lane])
    warm = num_lanes * (num_rounds // 4)
    begin, total = ends[warm - 1], ends[-1] - ends[warm - 1]
    rate = (len(ends) - warm) / total if total > 0 else float("inf")
    busy = [0.0] * num_stages
    for one in slices:
        busy[one.stage] += max(0.0, min(one.end, now) - max(one.start, begin))
    for stage, under_way in enumerate(jobs):
        busy[stage] += now - max(under_way.start, begin) if under_way is not None else 0.0
    return Simulation(
        rate,
        tuple(min(1.0, seconds / total) if total > 0 else 0.0 for seconds in busy),
        sum(latencies[warm:]) / (len(latencies) - warm),
        tuple(slices),
    )


def _least(now: float) -> float:
    """Seconds of work below which nothing is left but rounding."""
    return 1e-12 * max(1.0, now)


def _check(
    lanes: Sequence[Sequence[float]],
    times: Sequence[float],
    speeds: Sequence[float],
    num_rounds: int,
) -> None:
    if not lanes or not lanes[0] or num_rounds < 4:
        raise ValueError(
            "simulate: lanes, stages and num_rounds must be at least 1, 1 and 4, got "
            f"{len(lanes)}, {len(lanes[0]) if lanes else 0} and {num_rounds}; give a lane with a "
            "stage at least"
        )
    if len({len(stages) for stages in lanes}) > 1:
        raise ValueError(
            f"simulate: lanes must have the same stages, got {sorted(map(len, lanes))} of them; "
            "give each lane a time a stage"
        )
    if not times or min(*(second for stages in lanes for second in stages), *times) < 0:
        raise ValueError(
            f"simulate: times must not be negative, got {list(map(list, lanes))} and "
            f"{list(times)}; give seconds"
        )
    if not speeds or min(speeds) <= 0:
        raise ValueError(
            f"simulate: speeds must be above 0, got {list(speeds)}; give that of one stage at least"
        )


def draw(simulation: Simulation, begin: float, end: float, width: int = 72) -> str:
    """What every stage does from `begin` to `end`, a line a stage, its lane's number in each cell.

    A cell is (end - begin) / width seconds and shows what fills most of it; `.` is an idle stage.
    """
    cell = (end - begin) / width
    num_stages = len(simulation.utilisation)
    lines = []
    for stage in range(num_stages):
        mine = [one for one in simulation.slices if one.stage == stage]
        row = ""
        for column in range(width):
            left = begin + column * cell
            shares: dict[str, float] = {}
            for one in mine:
                overlap = min(one.end, left + cell) - max(one.start, left)
                if overlap > 0:
                    name = LETTERS[one.lane % len(LETTERS)]
                    shares[name] = shares.get(name, 0.0) + overlap
            best = max(shares, key=lambda name: shares[name], default=".")
            row += best if sum(shares.values()) >= cell / 2 else "."
        lines.append(f"stage {stage:<2} {row}")
    return "\n".join(lines)
