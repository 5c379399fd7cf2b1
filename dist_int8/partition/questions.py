"""Answers what users ask: does it fit, how much fits, and if not, what would. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dist_int8.config import DEFAULT_MAX_TOKENS
from dist_int8.partition import memory
from dist_int8.partition.activations import Workload
from dist_int8.partition.alone import predict_alone
from dist_int8.partition.plan import Plan, format_bytes
from dist_int8.partition.planner import (
    CutOptions,
    Device,
    can_plan,
    check_count,
    check_pinned,
    plan_stages,
)

MAX_SEQUENCES = 4096  # limit of the answer to a question that leaves the number open
_MAX_BYTES = 2**50


@dataclass(frozen=True)
class Question:
    """How much the model should serve.

    Attributes:
        num_sequences: number of slots in the KV cache; None: as many as fit.
        max_tokens: number of tokens in a slot; None: as many as fit, up to 2048 and the model's
            limit.
        prefill_chunk: maximum number of prompt tokens in a micro-batch.
        num_micro_batches: number of micro-batches that share the sequences; None: one per stage.
        records_steps: whether decode steps are CUDA graphs.
        options: how to cut the model into stages.
    """

    num_sequences: int | None = None
    max_tokens: int | None = None
    prefill_chunk: int = 512
    num_micro_batches: int | None = None
    records_steps: bool = False
    options: CutOptions = field(default_factory=CutOptions)

    def workload(self, num_sequences: int, max_tokens: int) -> Workload:
        """Returns the workload of this question with nothing left open."""
        return Workload(
            num_sequences,
            max_tokens,
            self.prefill_chunk,
            self.num_micro_batches,
            self.records_steps,
        )


def ask(
    model: memory.ModelSizes, devices: Sequence[Device], formats: memory.Formats, question: Question
) -> Plan:
    """Plans for a question.

    The model is cut for what must fit: the number of sequences in the question, or one. What the
    question leaves open is then set to the largest value that this cut has room for. A plan that
    does not fit carries suggestions, each of them verified.

    Raises:
        ValueError: a count is below 1, there are more tokens than the model has positions, or the
            stages are impossible (see `plan_stages`).
    """
    check(model, devices, question)
    plan = _answer(model, devices, formats, question)
    alone = predict_alone(model, _find_devices(plan, devices), formats, plan)
    return replace(plan, alone_ps=alone)


def _answer(
    model: memory.ModelSizes, devices: Sequence[Device], formats: memory.Formats, question: Question
) -> Plan:
    limit = min(DEFAULT_MAX_TOKENS, model.max_positions or DEFAULT_MAX_TOKENS)

    def fits(workload: Workload) -> bool:
        return can_plan(model, devices, formats, workload, question.options)

    num_sequences = question.num_sequences or 1
    max_tokens = question.max_tokens
    if max_tokens is None:
        max_tokens = largest(1, limit, lambda n: fits(question.workload(num_sequences, n))) or 1
    workload = question.workload(num_sequences, max_tokens)
    plan = plan_stages(model, devices, formats, workload, question.options)
    if not plan.fits:
        case = _Case(model, devices, formats, workload, question.options)
        is_open = None in (question.num_sequences, question.max_tokens)
        asked = "at the least" if is_open else plan.asked
        return replace(plan, suggestions=tuple(_suggest(case)), asked=asked)
    if question.num_sequences is None:
        return _with_most_sequences(model, devices, formats, question, plan, max_tokens)
    return replace(plan, asked="room for") if question.max_tokens is None else plan


def _with_most_sequences(
    model: memory.ModelSizes,
    devices: Sequence[Device],
    formats: memory.Formats,
    question: Question,
    plan: Plan,
    max_tokens: int,
) -> Plan:
    """Plans the same cut for as many sequences as it has room for."""
    if plan.kv_tokens is None:
        return replace(plan, asked="assumed")
    used = _find_devices(plan, devices)
    options = CutOptions(pinned=tuple(len(stage.blocks) for stage in plan.stages))

    def fits(num_sequences: int) -> bool:
        workload = question.workload(num_sequences, max_tokens)
        return can_plan(model, used, formats, workload, options)

    most = min(MAX_SEQUENCES, max(1, plan.kv_tokens // max_tokens))
    num_sequences = max(1, largest(1, most, fits))
    settled = question.workload(num_sequences, max_tokens)
    settled_plan = plan_stages(model, used, formats, settled, options)
    if num_sequences == MAX_SEQUENCES:
        note = f"more than {MAX_SEQUENCES} sequences may fit; ask with --sequences"
        settled_plan = replace(settled_plan, notes=(note,))
    return replace(settled_plan, asked="room for")


def _find_devices(plan: Plan, devices: Sequence[Device]) -> list[Device]:
    """Finds the device of each stage, also where several devices have the same name."""
    left = list(devices)
    used = []
    for stage in plan.stages:
        wanted = (stage.host, stage.device, stage.budget)
        device = next(d for d in left if (d.host, d.name, d.budget) == wanted)
        left.remove(device)
        used.append(device)
    return used


def check(model: memory.ModelSizes, devices: Sequence[Device], question: Question) -> None:
    """Checks what a plan does not depend on memory for.

    Raises:
        ValueError: as `ask`.
    """
    _check_counts(model, question)
    pinned = question.options.pinned
    if pinned is None:
        check_count(len(devices), len(model.blocks), question.options.choose_count)
    else:
        check_pinned(pinned, len(model.blocks), len(devices))


def _check_counts(model: memory.ModelSizes, question: Question) -> None:
    for key, value, hint in (
        ("sequences", question.num_sequences, "leave it out for as many as fit"),
        ("context", question.max_tokens, "leave it out for as much as fits"),
        ("prefill_chunk", question.prefill_chunk, "512 is the default"),
        ("micro_batches", question.num_micro_batches, "leave it out for one per stage"),
    ):
        if value is not None and value < 1:
            raise ValueError(f"plan: {key} must be at least 1, got {value}; {hint}")
    limit = model.max_positions
    if limit is not None and question.max_tokens is not None and question.max_tokens > limit:
        raise ValueError(
            f"plan: context must be at most the model's {limit} positions, got "
            f"{question.max_tokens}; lower it or leave it out"
        )


def largest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """Finds the largest number in least..most that fits, by bisection; 0 if `least` does not."""
    if not fits(least):
        return 0
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class _Case:
    """Everything that decides whether a plan fits."""

    model: memory.ModelSizes
    devices: Sequence[Device]
    formats: memory.Formats
    workload: Workload
    options: CutOptions

    def fits(self, **changes: Any) -> bool:
        """Returns whether the case fits with some of its fields changed."""
        case = replace(self, **changes)
        if len(case.devices) > len(case.model.blocks):
            return False
        return can_plan(case.model, case.devices, case.formats, case.workload, case.options)


def _suggest(case: _Case) -> Iterator[str]:
    """Suggests single changes that make a case fit, the cheapest first; each has been tried."""
    unpinned = replace(case.options, pinned=None)
    if case.options.pinned is not None and case.fits(options=unpinned):
        yield "let the planner choose the stages instead of pinning them"
    yield from _suggest_formats(case)
    yield from _suggest_workloads(case)
    yield from _suggest_devices(case)
    yield from _larger_budgets(case.devices, lambda changed: case.fits(devices=changed))


def _suggest_formats(case: _Case) -> Iterator[str]:
    formats = case.formats
    in_int8 = replace(formats, int8=True)
    in_int8 = replace(in_int8, head_int8=in_int8.is_int8("lm_head"))
    if not formats.int8 and case.fits(formats=in_int8):
        yield "keep the linear layers in int8 (int8: true)"
    head = replace(formats, head_int8=True)
    embedding = replace(formats, embedding_int8=True)
    for changed, what in (
        (head, "an int8 head"),
        (embedding, "an int8 embedding"),
        (replace(head, embedding_int8=True), "an int8 head and embedding"),
    ):
        if changed != formats and case.fits(formats=changed):
            yield f"take {what} ({_hint(changed, formats)})"
            break
    if not formats.kv_int8 and case.fits(formats=replace(formats, kv_int8=True)):
        yield "take an int8 KV cache (--kv int8)"


def _suggest_workloads(case: _Case) -> Iterator[str]:
    def most(field: str) -> int:
        def fits(number: int) -> bool:
            changed: dict[str, Any] = {field: number}
            return case.fits(workload=replace(case.workload, **changed))

        return largest(1, getattr(case.workload, field), fits)

    workload = case.workload
    if chunk := most("prefill_chunk"):
        yield f"cut prompts into chunks of {chunk} instead of {workload.prefill_chunk} tokens"
    if fewer := most("num_sequences"):
        yield f"lower sequences from {workload.num_sequences} to {fewer}"
    if shorter := most("max_tokens"):
        yield f"shorten the context from {workload.max_tokens} to {shorter} tokens"


def _suggest_devices(case: _Case) -> Iterator[str]:
    devices, unpinned = case.devices, replace(case.options, pinned=None)
    reserve = max(device.reserve for device in devices)
    if reserve and case.fits(devices=_with_reserve(devices, 0)):
        lower = largest(0, reserve, lambda n: case.fits(devices=_with_reserve(devices, n)))
        yield f"lower the reserve from {format_bytes(reserve)} to {format_bytes(lower)}"
    if not unpinned.choose_count and case.fits(options=replace(unpinned, choose_count=True)):
        yield "leave devices without a stage (--stages auto)"
    for more in range(1, len(case.model.blocks) - len(devices) + 1):
        if case.fits(devices=[*devices, *[devices[-1]] * more], options=unpinned):
            noun = "device" if more == 1 else "devices"
            yield f"add {more} more {noun} like {devices[-1].name}: {len(devices) + more} in all"
            break


def _with_reserve(devices: Sequence[Device], reserve: int) -> list[Device]:
    return [replace(device, reserve=min(device.reserve, reserve)) for device in devices]


def _larger_budgets(
    devices: Sequence[Device], fits: Callable[[Sequence[Device]], bool]
) -> Iterator[str]:
    """Suggests the smallest budget that fits: of the one device that is too small, or of each."""
    budgets = [device.budget for device in devices]

    def smallest(of: Callable[[int], Sequence[Device]]) -> int | None:
        if not fits(of(_MAX_BYTES)):
            return None
        return _MAX_BYTES - largest(0, _MAX_BYTES, lambda less: fits(of(_MAX_BYTES - less)))

    for index, device in enumerate(devices):
        if device.budget is not None and len(set(budgets)) > 1:
            found = smallest(partial(_with_budget, devices, {index}))
            if found is not None:
                yield f"give {device.name} {found} bytes instead of {device.budget}"
                return
    found = smallest(partial(_with_budget, devices, set(range(len(devices)))))
    if found is not None:
        yield f"give every device {found} bytes ({format_bytes(found)})"


def _with_budget(devices: Sequence[Device], which: set[int], least: int) -> list[Device]:
    return [
        replace(device, budget=max(least, device.budget))
        if index in which and device.budget is not None
        else device
        for index, device in enumerate(devices)
    ]


def _hint(changed: memory.Formats, before: memory.Formats) -> str:
    hints = []
    if changed.head_int8 and not before.head_int8:
        hints.append("--head int8")
    if changed.embedding_int8 and not before.embedding_int8:
        hints.append("--embedding int8")
    return "; ".join(hints)
