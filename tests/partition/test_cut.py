"""The search agrees with brute force on hundreds of small random problems."""

import itertools
import random

import pytest

from dist_int8.partition.cut import cut, fits, least_missing
from dist_int8.partition.problem import UNLIMITED, Problem, StageSpan

NUM_RANDOM = 300


def random_problem(rng, may_skip):
    """Draws up to 8 blocks on up to 4 devices; sizes, speeds and rooms all differ."""
    num_blocks = rng.randint(1, 8)
    num_devices = rng.randint(1, min(4, num_blocks))
    block_bytes = [rng.choice([5, 10, 10, 10, rng.randint(1, 40)]) for _ in range(num_blocks)]
    first, last = rng.randint(0, 30), rng.randint(0, 30)
    total = sum(block_bytes) + first + last
    speeds = [rng.choice([1, 1, 2, rng.randint(1, 9)]) for _ in range(num_devices)]
    work = [rng.randint(1, 9) for _ in range(num_blocks)]
    hosts = [rng.randint(0, 1) for _ in range(num_devices)]
    return Problem(
        times=[[speed * w for w in work] for speed in speeds],
        last_times=[speed * rng.randint(0, 12) for speed in speeds],
        hops=[[1 if a == b else rng.randint(1, 6) for b in hosts] for a in hosts],
        block_bytes=block_bytes,
        kv_bytes=[rng.randint(1, 3) for _ in range(num_blocks)],
        first_bytes=first,
        last_bytes=last,
        shared_bytes=rng.randint(0, min(first, last)),
        rooms=[
            rng.choice([None, rng.randint(0, total * 2 // num_devices), total])
            for _ in range(num_devices)
        ],
        num_tokens=rng.randint(0, 6),
        may_skip=may_skip,
    )


def all_cuts(problem):
    devices = range(problem.num_devices)
    counts = devices if problem.may_skip else [problem.num_devices - 1]
    for num_cuts in counts:
        for used in itertools.combinations(devices, num_cuts + 1):
            for edges in itertools.combinations(range(1, problem.num_blocks), num_cuts):
                edges = [0, *edges, problem.num_blocks]
                yield [
                    StageSpan(device, start, end)
                    for device, (start, end) in zip(used, itertools.pairwise(edges), strict=True)
                ]


def is_within(problem, stages):
    return not any(problem.missing(s.device, s.start, s.end) for s in stages)


def stage_times(problem, stages):
    hops = [problem.hops[a.device][b.device] for a, b in itertools.pairwise(stages)]
    times = [problem.time(s.device, s.start, s.end) for s in stages]
    return [time + hop for time, hop in zip(times, [*hops, 0], strict=True)]


def least_tokens(problem, stages):
    return min(problem.tokens(s.device, s.start, s.end) for s in stages)


def value(problem, stages, objective):
    """Returns what the objective minimizes, and the tie-breaker."""
    times = stage_times(problem, stages)
    tokens = -least_tokens(problem, stages)
    if objective == "latency":
        return sum(times), max(times)
    if objective == "max_kv_tokens":
        return tokens, max(times)
    return max(times), tokens if None not in problem.rooms else 0


@pytest.mark.parametrize("objective", ["throughput", "latency", "max_kv_tokens"])
@pytest.mark.parametrize("may_skip", [False, True])
def test_cut_is_as_good_as_brute_force(objective, may_skip):
    rng = random.Random(f"{objective} {may_skip}")
    num_solved = 0
    for _ in range(NUM_RANDOM):
        problem = random_problem(rng, may_skip)
        possible = [stages for stages in all_cuts(problem) if is_within(problem, stages)]
        found = cut(problem, objective)
        assert fits(problem) == bool(possible)
        assert (found is None) == (not possible)
        if found is None:
            continue
        num_solved += 1
        assert found in possible  # contiguous, complete, non-empty, within every room
        best = min(value(problem, stages, objective) for stages in possible)
        assert value(problem, found, objective) == best
        assert cut(problem, objective) == found
    assert NUM_RANDOM / 4 < num_solved < NUM_RANDOM


@pytest.mark.parametrize("may_skip", [False, True])
def test_least_missing_agrees_with_brute_force(may_skip):
    rng = random.Random(7)
    for _ in range(NUM_RANDOM):
        problem = random_problem(rng, may_skip)

        def missing(stages, problem=problem):
            each = [problem.missing(s.device, s.start, s.end) for s in stages]
            return sum(each), max(each)

        found = least_missing(problem)
        assert missing(found) == min(missing(stages) for stages in all_cuts(problem))


def test_slow_device_and_heavy_head_get_fewer_blocks():
    """Six equal blocks; the head takes as long as two, the middle device is four times slower."""
    problem = Problem(
        times=[[2] * 6, [8] * 6, [2] * 6],
        last_times=[4, 16, 4],
        hops=[[0] * 3] * 3,
        block_bytes=[1] * 6,
        kv_bytes=[1] * 6,
        first_bytes=0,
        last_bytes=0,
        shared_bytes=0,
        rooms=[None] * 3,
        num_tokens=0,
    )
    drawn = ["".join(str(s.device) * (s.end - s.start) for s in cut(problem, "throughput"))]
    assert drawn == ["000122"]
    assert least_tokens(problem, cut(problem, "throughput")) == UNLIMITED
