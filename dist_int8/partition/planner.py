"""Chooses the stages of a model on given devices within their budgets. Pure.

Counts bytes (`memory`, `activations`) and times (`cost`), lets `cut` find the best stages, and
writes down what each holds. Where nothing fits the plan says so: it has the stages that lack the
fewest bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import get_args

from dist_int8.partition import cost, cut, memory
from dist_int8.partition.activations import Workload, activation_bytes
from dist_int8.partition.cut import BlockRange, Objective, Problem
from dist_int8.partition.plan import Plan, StagePlan
from dist_int8.partition.profiles import DeviceProfile

FLOAT32 = memory.Formats(int8=False, float_size=4, vocab_size=4)
OBJECTIVES = get_args(Objective)


@dataclass(frozen=True)
class Device:
    """One place for a stage.

    Attributes:
        name: "cpu" or "cuda:N", as the host numbers it.
        profile: how fast it is.
        budget: bytes that the stage may use there; None: unlimited.
        reserve: bytes of the budget to leave alone.
        host: name of its machine; passing hidden states to another one costs more.
    """

    name: str
    profile: DeviceProfile
    budget: int | None = None
    reserve: int = 0
    host: str = "localhost"


@dataclass(frozen=True)
class CutOptions:
    """Which cut is wanted.

    Attributes:
        objective: what to make best.
        pinned: number of blocks of each stage; None: the planner chooses.
        choose_count: leave devices out where that is better; otherwise each gets a stage.
        prefill_ratio: prompt tokens for every new one, at least 0; latency does not count them.
    """

    objective: Objective = "throughput"
    pinned: tuple[int, ...] | None = None
    choose_count: bool = False
    prefill_ratio: float = 1.0


def plan_stages(
    model: memory.ModelSizes,
    devices: Sequence[Device],
    formats: memory.Formats,
    workload: Workload,
    options: CutOptions | None = None,
) -> Plan:
    """The best contiguous stages for one workload; `Plan.fits` says whether they fit.

    Raises:
        ValueError: more stages than blocks, pinned stages that are not one a device or do not add
            up to the model's blocks.
    """
    options = options or CutOptions()
    assert devices and options.objective in OBJECTIVES
    ratio = 0.0 if options.objective == "latency" else options.prefill_ratio
    problem = make_problem(
        model, devices, formats, workload, options.choose_count, prefill_ratio=ratio
    )
    if options.pinned is not None:
        stages = _pinned(options.pinned, problem.num_blocks, len(devices))
    else:
        check_count(len(devices), problem.num_blocks, options.choose_count)
        stages = cut.cut(problem, options.objective) or cut.least_missing(problem)
    return _write_down(model, devices, formats, workload, problem, stages)


def can_plan(
    model: memory.ModelSizes,
    devices: Sequence[Device],
    formats: memory.Formats,
    workload: Workload,
    options: CutOptions,
) -> bool:
    """Whether a plan would fit; cheaper than the plan."""
    problem = make_problem(model, devices, formats, workload, options.choose_count)
    if options.pinned is not None:
        stages = _pinned(options.pinned, problem.num_blocks, len(devices))
        return not any(problem.missing(s.device, s.start, s.end) for s in stages)
    return cut.fits(problem)


def check_count(num_stages: int, num_blocks: int, choose_count: bool = False) -> None:
    """Raises ValueError for more stages than blocks."""
    if num_stages > num_blocks and not choose_count:
        raise ValueError(
            f"plan: stages must be at most the model's {num_blocks} blocks, got {num_stages}; "
            f"use {num_blocks} or fewer stages"
        )


def make_problem(
    model: memory.ModelSizes,
    devices: Sequence[Device],
    formats: memory.Formats,
    workload: Workload,
    choose_count: bool = False,
    *,
    prefill_ratio: float = 0.0,
) -> Problem:
    """The numbers of a question.

    Args:
        prefill_ratio: the time of a block is that of a decode step and of so many prompt tokens
            for each of its tokens: a pipeline that always has requests to run does both, and of the
            prompts the head takes next to nothing. Where reading the weights bounds a decode step,
            few prompts weigh little.
    """
    num_devices = len(devices)
    middle = activation_bytes(model, formats, workload, first=False, last=False)
    last = activation_bytes(model, formats, workload, first=False, last=True)
    both = activation_bytes(model, formats, workload, first=True, last=True)
    alone = num_devices == 1
    times = _times(model, devices, formats, workload, prefill_ratio)
    rows = _decode_rows(workload, num_devices)
    return Problem(
        times=times,
        last_times=[cost.head_ps(model, formats, d.profile, num_rows=rows) for d in devices],
        hops=[
            [
                cost.hop_ps(
                    model, formats, d.profile, num_rows=rows, same_host=d.host == other.host
                )
                for other in devices
            ]
            for d in devices
        ],
        block_bytes=[memory.block_bytes(b, formats, i) for i, b in enumerate(model.blocks)],
        kv_bytes=[
            memory.kv_bytes_per_token(b, formats.float_size, int8=formats.kv_int8)
            for b in model.blocks
        ],
        first_bytes=memory.embedding_bytes(model, formats),
        last_bytes=memory.head_bytes(model, formats) + last - middle,
        shared_bytes=memory.shared_bytes(model, formats) + last - both,
        rooms=[None if d.budget is None else d.budget - d.reserve - middle for d in devices],
        num_tokens=workload.num_tokens,
        may_skip=choose_count and not alone,
    )


def _decode_rows(workload: Workload, num_stages: int) -> int:
    """Sequences of one micro-batch, one token each."""
    num_micro_batches = min(workload.num_micro_batches or num_stages, workload.num_sequences)
    return -(-workload.num_sequences // num_micro_batches)


def _times(
    model: memory.ModelSizes,
    devices: Sequence[Device],
    formats: memory.Formats,
    workload: Workload,
    prefill_ratio: float,
) -> list[list[int]]:
    """Picoseconds of a step of every block on every device; equal ones counted once.

    Sequences are taken as half as long as they may grow, which is their mean.
    """
    chunk = min(workload.prefill_chunk, workload.max_tokens)
    rows = _decode_rows(workload, len(devices))
    known: dict[tuple[object, ...], int] = {}

    def time(profile: DeviceProfile, index: int) -> int:
        block = model.blocks[index]
        key = (profile, block, index if formats.skip else 0)
        if key not in known:
            how = {"context": workload.max_tokens // 2, "index": index}
            decode = {"num_rows": rows, "num_sequences": rows}
            known[key] = cost.block_ps(block, formats, profile, **decode, **how)
            if prefill_ratio:
                prefill = {"num_rows": chunk, "num_sequences": 1}
                of_chunk = cost.block_ps(block, formats, profile, **prefill, **how)
                known[key] += round(of_chunk * rows * prefill_ratio / chunk)
        return known[key]

    return [[time(d.profile, index) for index in range(len(model.blocks))] for d in devices]


def _pinned(pinned: Sequence[int], num_blocks: int, num_devices: int) -> list[BlockRange]:
    if len(pinned) != num_devices:
        raise ValueError(
            f"plan: stages must be one number of blocks a device, {num_devices} devices, got "
            f"{list(pinned)}; write {num_devices} numbers"
        )
    if sum(pinned) != num_blocks or min(pinned) < 1:
        raise ValueError(
            f"plan: stages must be numbers of blocks above 0 that add up to the model's "
            f"{num_blocks}, got {list(pinned)} with sum {sum(pinned)}; correct them"
        )
    edges = [0, *accumulate(pinned)]
    return [BlockRange(d, start, end) for d, (start, end) in enumerate(pairwise(edges))]


def _write_down(
    model: memory.ModelSizes,
    devices: Sequence[Device],
    formats: memory.Formats,
    workload: Workload,
    problem: Problem,
    stages: Sequence[BlockRange],
) -> Plan:
    written = []
    decode = make_problem(model, devices, formats, workload)
    for rank, stage in enumerate(stages):
        device = devices[stage.device]
        first, last = rank == 0, rank == len(stages) - 1
        blocks = range(stage.start, stage.end)
        hop = 0 if last else problem.hops[stage.device][stages[rank + 1].device]
        kv_bytes = sum(
            memory.kv_bytes_per_token(model.blocks[i], formats.float_size, int8=formats.kv_int8)
            for i in blocks
        )
        written.append(
            StagePlan(
                rank=rank,
                host=device.host,
                device=device.name,
                first_block=stage.start,
                last_block=stage.end - 1,
                weight_bytes=memory.stage_weight_bytes(
                    model, blocks, formats, first=first, last=last
                ),
                float_bytes=memory.stage_weight_bytes(
                    model, blocks, FLOAT32, first=first, last=last
                ),
                kv_bytes=workload.num_tokens * kv_bytes,
                activation_bytes=activation_bytes(model, formats, workload, first=first, last=last),
                reserve_bytes=device.reserve,
                budget=device.budget,
                ps=decode.time(stage.device, stage.start, stage.end) + hop,
                prefill_ps=_prefill_ps(model, device, formats, workload, blocks, last),
                profile=device.profile.name,
            )
        )
    tokens = min(problem.tokens(s.device, s.start, s.end) for s in stages)
    return Plan(
        stages=tuple(written),
        num_blocks=problem.num_blocks,
        block_bytes=max(memory.block_bytes(b, formats, i) for i, b in enumerate(model.blocks)),
        model_bytes=memory.model_bytes(model, formats),
        kv_bytes_per_token=sum(
            memory.kv_bytes_per_token(block, formats.float_size, int8=formats.kv_int8)
            for block in model.blocks
        ),
        kv_tokens=None if tokens == cut.UNLIMITED else max(0, tokens),
        workload=workload,
    )


def _prefill_ps(
    model: memory.ModelSizes,
    device: Device,
    formats: memory.Formats,
    workload: Workload,
    blocks: range,
    last: bool,
) -> int:
    """Picoseconds of a micro-batch of as many prompt tokens as it may carry, of one sequence."""
    rows = min(workload.prefill_chunk, workload.max_tokens)
    total = sum(
        cost.block_ps(
            model.blocks[i],
            formats,
            device.profile,
            num_rows=rows,
            num_sequences=1,
            context=workload.max_tokens // 2,
            index=i,
        )
        for i in blocks
    )
    return total + (cost.head_ps(model, formats, device.profile, num_rows=1) if last else 0)
