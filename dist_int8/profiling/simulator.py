"""Predicts how fast a pipeline runs. Pure Python; imports no other module of the package.

Decode in steady state: each lane's micro-batch passes through the stages, its tokens travel back to
stage 0, and it starts again. A stage works on one micro-batch at a time, first come, first served.

    stage 0  |0000|1111|2222|0000|1111|          stages of 4 and 5, hop 1, three lanes:
    stage 1       |00000|11111|22222|00000|      a micro-batch every 5, the slowest stage busy

With m lanes over P stages of equal time t and hop h, a round takes max(m t, P (t + h)), so the
pipeline is full when m >= P (1 + h / t). But t itself depends on m. If reading a stage's weights
takes a and each row b, then S sequences in m lanes have t = a + b S / m, and a round takes
max(m a + b S, P (a + b S / m + h)):

- One lane more than stages pays off if P h > a, that is, if the hops around the ring take longer
  than reading the weights of a stage once: rarely on one machine, often over a slow network.
- While decode is bound by memory bandwidth, b is close to zero. One lane is then as fast as any
  number, and a pipeline gains nothing from splitting a batch in two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Slice:
    """One stage at work on one lane's micro-batch.

    Attributes:
        stage: number of the stage.
        lane: number of the lane.
        start: seconds from the start of the run to the start of the work.
        end: seconds from the start of the run to the end of the work.
    """

    stage: int
    lane: int
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """Result of a simulated run.

    Attributes:
        micro_batches_per_s: micro-batches per second in steady state, over all lanes.
        utilisation: share of the time that each stage works, in [0, 1].
        latency_s: mean seconds from the start of a micro-batch on stage 0 until its tokens are
            back there.
        slices: work of the whole run, in order of completion.
    """

    micro_batches_per_s: float
    utilisation: tuple[float, ...]
    latency_s: float
    slices: tuple[Slice, ...]


@dataclass
class _Job:
    lane: int
    work: float  # seconds left at full speed
    start: float


def simulate(
    lanes: Sequence[Sequence[float]],
    hop_s: float | Sequence[float] = 0.0,
    host_s: float = 0.0,
    speeds: Sequence[float] = (1.0,),
    num_rounds: int = 32,
    turnaround_s: float | Sequence[float] = 0.0,
) -> Simulation:
    """Runs every lane `num_rounds` times; the first quarter fills the pipeline and is not counted.

    Args:
        lanes: for each lane, the seconds that each stage works on its micro-batch when alone.
        hop_s: seconds from the end on one stage until the next may start, including the way back;
            ignored for a single stage. A sequence gives the time while 0, 1, ... stages work, for
            stages that share cores and make a message wait; its last entry holds for more.
        host_s: seconds that rank 0 works outside its stage, for every micro-batch.
        speeds: speed of each of 1, 2, ... stages that work at the same time, relative to one alone;
            the last entry holds for more. Three stages of one thread on two cores: (1, 1, 2 / 3).
        num_rounds: number of rounds of every lane.
        turnaround_s: seconds between two micro-batches on a stage even if the second is waiting, to
            send the one and unpack the other; stages that share cores slow that too. One value for
            all stages, or one per stage.

    Raises:
        ValueError: there are no lanes or stages, lanes differ in stages, or times make no sense.
    """
    hops = [hop_s] if isinstance(hop_s, int | float) else list(hop_s)
    num_stages = len(lanes[0]) if lanes else 0
    if isinstance(turnaround_s, int | float):
        turnaround_s = [float(turnaround_s)] * num_stages
    turnarounds = list(turnaround_s)
    _check(lanes, [*hops, host_s, *turnarounds], speeds, num_rounds)
    _check_turnarounds(turnarounds, num_stages)
    run = _Run(lanes, hops if num_stages > 1 else [0.0], host_s, speeds, turnarounds)
    while len(run.ends) < len(lanes) * num_rounds:
        run.start_jobs()
        run.finish_jobs(run.advance())
    return run.measure(num_warm=len(lanes) * (num_rounds // 4))


class _Run:
    """A run in progress: what waits, what works, and what is done, at the time `now`."""

    def __init__(
        self,
        lanes: Sequence[Sequence[float]],
        hops: Sequence[float],
        host_s: float,
        speeds: Sequence[float],
        turnarounds: Sequence[float],
    ) -> None:
        self.lanes, self.hops, self.host_s = lanes, hops, host_s
        self.speeds, self.turnarounds = speeds, turnarounds
        num_stages = len(lanes[0])
        # (arrival, lane) of the micro-batches that wait for each stage
        self.queues: list[deque[tuple[float, int]]] = [deque() for _ in range(num_stages)]
        self.queues[0].extend((0.0, lane) for lane in range(len(lanes)))
        self.jobs: list[_Job | None] = [None] * num_stages
        self.turning = [0.0] * num_stages  # seconds of work before each stage takes the next one
        self.begun = [0.0] * len(lanes)  # when each lane's micro-batch started on stage 0
        self.slices: list[Slice] = []
        self.latencies: list[float] = []
        self.ends: list[float] = []  # on the last stage
        self.now = 0.0

    def start_jobs(self) -> None:
        """Starts the next micro-batch on every stage that is free."""
        for stage, queue in enumerate(self.queues):
            free = self.jobs[stage] is None and not self.turning[stage]
            if free and queue and queue[0][0] <= self.now:
                lane = queue.popleft()[1]
                work = self.lanes[lane][stage] + (self.host_s if stage == 0 else 0.0)
                self.jobs[stage] = _Job(lane, work, self.now)
                if stage == 0:
                    self.begun[lane] = self.now

    def advance(self) -> list[tuple[int, _Job]]:
        """Moves the time to the next event; returns the stages that finished, with their jobs."""
        active = [job for job in self.jobs if job is not None]
        left = [*(job.work for job in active), *filter(None, self.turning)]
        speed = self.speeds[min(len(left), len(self.speeds)) - 1]
        arrivals = [
            queue[0][0]
            for queue, job, turn in zip(self.queues, self.jobs, self.turning, strict=True)
            if queue and job is None and not turn
        ]
        following = min([*arrivals, *(self.now + work / speed for work in left)])
        done_s, self.now = (following - self.now) * speed, following
        least = _least(self.now)
        for job in active:
            job.work -= done_s
        self.turning = [turn - done_s if turn - done_s > least else 0.0 for turn in self.turning]
        return [
            (stage, job)
            for stage, job in enumerate(self.jobs)
            if job is not None and job.work <= least
        ]

    def finish_jobs(self, finished: Sequence[tuple[int, _Job]]) -> None:
        """Sends finished micro-batches to the next stage, or back to stage 0."""
        num_stages = len(self.jobs)
        for stage, done in finished:
            self.jobs[stage] = None
            self.turning[stage] = self.turnarounds[stage]
            self.slices.append(Slice(stage, done.lane, done.start, self.now))
            at_work = sum(
                job is not None or bool(queue and queue[0][0] <= self.now)
                for job, queue in zip(self.jobs, self.queues, strict=True)
            )
            arrival = self.now + self.hops[min(at_work, len(self.hops) - 1)]
            queue = self.queues[(stage + 1) % num_stages]
            queue.append((max(arrival, queue[-1][0]) if queue else arrival, done.lane))
            if stage == num_stages - 1:
                self.ends.append(self.now)
                self.latencies.append(arrival - self.begun[done.lane])

    def measure(self, num_warm: int) -> Simulation:
        """Computes the result after the first `num_warm` micro-batches."""
        begin = self.ends[num_warm - 1]
        total = self.ends[-1] - begin
        rate = (len(self.ends) - num_warm) / total if total > 0 else float("inf")
        busy = [0.0] * len(self.jobs)
        for one in self.slices:
            busy[one.stage] += max(0.0, min(one.end, self.now) - max(one.start, begin))
        for stage, under_way in enumerate(self.jobs):
            if under_way is not None:
                busy[stage] += self.now - max(under_way.start, begin)
        return Simulation(
            rate,
            tuple(min(1.0, seconds / total) if total > 0 else 0.0 for seconds in busy),
            sum(self.latencies[num_warm:]) / (len(self.latencies) - num_warm),
            tuple(self.slices),
        )


def _least(now: float) -> float:
    """Returns the seconds of work below which only rounding errors are left."""
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
            f"{len(lanes)}, {len(lanes[0]) if lanes else 0} and {num_rounds}; give at "
            "least one lane with one stage"
        )
    if len({len(stages) for stages in lanes}) > 1:
        raise ValueError(
            f"simulate: lanes must have the same stages, got {sorted(map(len, lanes))} of them; "
            "give each lane one time per stage"
        )
    if not times or min(*(second for stages in lanes for second in stages), *times) < 0:
        raise ValueError(
            f"simulate: times must not be negative, got {list(map(list, lanes))} and "
            f"{list(times)}; give seconds"
        )
    if not speeds or min(speeds) <= 0:
        raise ValueError(f"simulate: speeds must be above 0, got {list(speeds)}; give at least one")


def _check_turnarounds(turnarounds: Sequence[float], num_stages: int) -> None:
    if len(turnarounds) != num_stages:
        raise ValueError(
            f"simulate: turnaround_s must be one time, or one for each of {num_stages} stages, got "
            f"{len(turnarounds)}; give {num_stages}"
        )


def draw(simulation: Simulation, begin: float, end: float, width: int = 72) -> str:
    """Draws what every stage does from `begin` to `end`, one line per stage.

    Each character covers (end - begin) / width seconds and names the lane that fills most of it;
    `.` is an idle stage.
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
