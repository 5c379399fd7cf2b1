"""Chooses the stages of a model on given devices within their budgets. Pure.

Counts bytes (`memory`, `activations`) and times (`cost`), lets `cut` find the best stages, and
records what each one holds. If nothing fits, the plan has the stages that lack the fewest bytes and
says how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import get_args

from dist_int8.partition import cost, cut, memory
from dist_int8.partition.activations import Workload, activation_bytes
from dist_int8.partition.cut import Objective
from dist_int8.partition.plan import Plan, StagePlan
from dist_int8.partition.problem import UNLIMITED, Problem, StageSpan
from dist_int8.partition.profiles import DeviceProfile

FLOAT32 = memory.Formats(int8=False, float_size=4, vocab_size=4)
OBJECTIVES = get_args(Objective)


@dataclass(frozen=True)
class Device:
    """A device that can hold a stage.

    Attributes:
        name: "cpu" or "cuda:N", as the host numbers it.
        profile: speed of the device.
        budget: bytes that the stage may use there; None: unlimited.
        reserve: bytes of the budget to keep free.
        host: name of the machine; passing hidden states to another host costs more.
    """

    name: str
    profile: DeviceProfile
    budget: int | None = None
    reserve: int = 0
    host: str = "localhost"


@dataclass(frozen=True)
class CutOptions:
    """How to cut the model into stages.

    Attributes:
        objective: quantity to optimize.
        pinned: number of blocks of each stage; None: the planner chooses.
        choose_count: whether devices may stay unused where that is better; otherwise each gets a
            stage.
        prefill_ratio: prompt tokens per generated token, at least 0; ignored for latency.
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
    """Finds the best contiguous stages for one workload; `Plan.fits` says whether they fit.

    Raises:
        ValueError: there are more stages than blocks, or the pinned stages are not one per device
            or do not add up to the model's blocks.
    """
    options = options or CutOptions()
    assert devices and options.objective in OBJECTIVES
    ratio = 0.0 if options.objective == "latency" else options.prefill_ratio
    problem = make_problem(
        model, devices, formats, workload, options.choose_count, prefill_ratio=ratio
    )
    if options.pinned is not None:
        stages = check_pinned(options.pinned, problem.num_blocks, len(devices))
    else:
        check_count(len(devices), problem.num_blocks, options.choose_count)
        stages = cut.cut(problem, options.objective) or cut.least_missing(problem)
    return _make_plan(model, devices, formats, workload, problem, stages)


def can_plan(
    model: memory.ModelSizes,
    devices: Sequence[Device],
    formats: memory.Formats,
    workload: Workload,
    options: CutOptions,
) -> bool:
    """Returns whether a plan would fit, at less cost than making it."""
    problem = make_problem(model, devices, formats, workload, options.choose_count)
    if options.pinned is not None:
        stages = check_pinned(options.pinned, problem.num_blocks, len(devices))
        return not any(problem.missing(s.device, s.start, s.end) for s in stages)
    return cut.fits(problem)


def check_count(num_stages: int, num_blocks: int, choose_count: bool = False) -> None:
    """Raises ValueError if there are more stages than blocks."""
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
    """Computes the numbers that the search works on.

    Args:
        prefill_ratio: prompt tokens per generated token. A block's time is that of a decode step
            plus that share of a prefill step: a pipeline that always has requests to run does both.
            Few prompt tokens weigh little where a decode step is bound by reading the weights. The
            head's time is that of decode alone, since it runs on the last token of a prompt only.
    """
    middle = activation_bytes(model, formats, workload, first=False, last=False)
    last = activation_bytes(model, formats, workload, first=False, last=True)
    both = activation_bytes(model, formats, workload, first=True, last=True)
    rows = _decode_rows(workload, len(devices))
    return Problem(
        times=_times(model, devices, formats, workload, prefill_ratio),
        last_times=[
            cost.head_ps(
                model, formats, d.profile, num_rows=rows, is_recorded=workload.records_steps
            )
            for d in devices
        ],
        hops=_hops(model, devices, formats, rows),
        block_bytes=[memory.block_bytes(b, formats, i) for i, b in enumerate(model.blocks)],
        kv_bytes=_kv_bytes(model, formats),
        first_bytes=memory.embedding_bytes(model, formats),
        last_bytes=memory.head_bytes(model, formats) + last - middle,
        shared_bytes=memory.shared_bytes(model, formats) + last - both,
        rooms=[None if d.budget is None else d.budget - d.reserve - middle for d in devices],
        num_tokens=workload.num_tokens,
        may_skip=choose_count and len(devices) > 1,
    )


def _hops(
    model: memory.ModelSizes, devices: Sequence[Device], formats: memory.Formats, num_rows: int
) -> list[list[int]]:
    """Computes the picoseconds of a hop from each device to each other one."""
    return [
        [
            cost.hop_ps(
                model, formats, d.profile, num_rows=num_rows, same_host=d.host == other.host
            )
            for other in devices
        ]
        for d in devices
    ]


def _kv_bytes(model: memory.ModelSizes, formats: memory.Formats) -> list[int]:
    """Computes the bytes of one token in each block's KV cache."""
    return [
        memory.kv_bytes_per_token(block, formats.float_size, int8=formats.kv_int8)
        for block in model.blocks
    ]


def _decode_rows(workload: Workload, num_stages: int) -> int:
    """Returns the number of sequences in a micro-batch, which decode one token each."""
    num_micro_batches = min(workload.num_micro_batches or num_stages, workload.num_sequences)
    return -(-workload.num_sequences // num_micro_batches)


def _prefill_step(workload: Workload) -> cost.StepShape:
    """A micro-batch full of prompt tokens of one sequence."""
    rows = min(workload.prefill_chunk, workload.max_tokens)
    return cost.StepShape(rows, num_sequences=1, context=workload.max_tokens // 2)


def _times(
    model: memory.ModelSizes,
    devices: Sequence[Device],
    formats: memory.Formats,
    workload: Workload,
    prefill_ratio: float,
) -> list[list[int]]:
    """Computes the picoseconds of a step of every block on every device, equal ones only once.

    Sequences count with half their maximum length, their mean while they grow.
    """
    rows, context = _decode_rows(workload, len(devices)), workload.max_tokens // 2
    decode = cost.StepShape(rows, rows, context, workload.records_steps)
    prefill = _prefill_step(workload)
    known: dict[tuple[object, ...], int] = {}

    def time(profile: DeviceProfile, index: int) -> int:
        block = model.blocks[index]
        key = (profile, block, index if formats.skip else 0)
        if key not in known:
            known[key] = cost.block_ps(block, formats, profile, decode, index)
            if prefill_ratio:
                of_chunk = cost.block_ps(block, formats, profile, prefill, index)
                known[key] += round(of_chunk * rows * prefill_ratio / prefill.num_rows)
        return known[key]

    return [[time(d.profile, index) for index in range(len(model.blocks))] for d in devices]


def check_pinned(pinned: Sequence[int], num_blocks: int, num_devices: int) -> list[StageSpan]:
    """Returns the stages of these numbers of blocks; ValueError if they do not fit the model."""
    if len(pinned) != num_devices:
        raise ValueError(
            f"plan: stages must be one number of blocks per device, {num_devices} in total, got "
            f"{list(pinned)}; write {num_devices} numbers"
        )
    if sum(pinned) != num_blocks or min(pinned) < 1:
        raise ValueError(
            f"plan: stages must be numbers of blocks above 0 that add up to the model's "
            f"{num_blocks}, got {list(pinned)} with sum {sum(pinned)}; correct them"
        )
    edges = [0, *accumulate(pinned)]
    return [StageSpan(d, start, end) for d, (start, end) in enumerate(pairwise(edges))]


def _make_plan(
    model: memory.ModelSizes,
    devices: Sequence[Device],
    formats: memory.Formats,
    workload: Workload,
    problem: Problem,
    stages: Sequence[StageSpan],
) -> Plan:
    """Records what each stage holds and how long it takes."""
    decode = make_problem(model, devices, formats, workload)
    planned = []
    for rank, stage in enumerate(stages):
        last = rank == len(stages) - 1
        hop = 0 if last else problem.hops[stage.device][stages[rank + 1].device]
        written = _stage_plan(model, devices[stage.device], formats, workload, stage)
        ps = decode.time(stage.device, stage.start, stage.end) + hop
        planned.append(replace(written, rank=rank, ps=ps))
    tokens = min(problem.tokens(s.device, s.start, s.end) for s in stages)
    return Plan(
        stages=tuple(planned),
        num_blocks=problem.num_blocks,
        block_bytes=max(problem.block_bytes),
        model_bytes=memory.model_bytes(model, formats),
        kv_bytes_per_token=sum(problem.kv_bytes),
        kv_tokens=None if tokens == UNLIMITED else max(0, tokens),
        workload=workload,
    )


def _stage_plan(
    model: memory.ModelSizes,
    device: Device,
    formats: memory.Formats,
    workload: Workload,
    stage: StageSpan,
) -> StagePlan:
    """Records what a stage holds; its rank and decode time depend on the others."""
    blocks = range(stage.start, stage.end)
    ends = {"first": stage.start == 0, "last": stage.end == len(model.blocks)}
    return StagePlan(
        rank=0,
        host=device.host,
        device=device.name,
        first_block=stage.start,
        last_block=stage.end - 1,
        weight_bytes=memory.stage_weight_bytes(model, blocks, formats, **ends),
        float_bytes=memory.stage_weight_bytes(model, blocks, FLOAT32, **ends),
        kv_bytes=workload.num_tokens * sum(_kv_bytes(model, formats)[stage.start : stage.end]),
        activation_bytes=activation_bytes(model, formats, workload, **ends),
        reserve_bytes=device.reserve,
        budget=device.budget,
        prefill_ps=_prefill_ps(model, device, formats, workload, blocks),
        profile=device.profile.name,
    )


def _prefill_ps(
    model: memory.ModelSizes,
    device: Device,
    formats: memory.Formats,
    workload: Workload,
    blocks: range,
) -> int:
    """Computes the picoseconds of a micro-batch full of prompt tokens of one sequence."""
    step = _prefill_step(workload)
    total = sum(
        cost.block_ps(model.blocks[i], formats, device.profile, step, index=i) for i in blocks
    )
    if blocks.stop == len(model.blocks):
        total += cost.head_ps(model, formats, device.profile, num_rows=1)
    return total
