"""What a user asks: does it fit, how much of it, and if not, what would. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from dist_int8.config import DEFAULT_MAX_TOKENS
from dist_int8.partition import memory
from dist_int8.partition.activations import Workload
from dist_int8.partition.plan import Plan, format_bytes
from dist_int8.partition.planner import Device, Request, can_plan, check_count, plan_stages

MOST_SEQUENCES = 4096  # that a question which names none is answered with
_MOST_BYTES = 2**50


@dataclass(frozen=True)
class Question:
    """How much is asked of the model; None: as much as fits.

    Attributes:
        num_sequences: slots of the KV cache.
        max_tokens: tokens of a slot; if None, at most 2048 or the model's limit.
        prefill_chunk: prompt tokens of one micro-batch at most.
        num_micro_batches: micro-batches that share the sequences; None: one a stage.
        request: which cut is wanted.
    """

    num_sequences: int | None = None
    max_tokens: int | None = None
    prefill_chunk: int = 512
    num_micro_batches: int | None = None
    request: Request = field(default_factory=Request)

    def workload(self, num_sequences: int, max_tokens: int) -> Workload:
        """This question with its open ends settled."""
        return Workload(num_sequences, max_tokens, self.prefill_chunk, self.num_micro_batches)


def ask(
    model: memory.Model, devices: Sequence[Device], formats: memory.Formats, question: Question
) -> Plan:
    """The plan for a question.

    The cut is made for what must fit: the sequences asked for, or one. Of what the question leaves
    open the plan then takes the most that this cut has room for. A plan that does not fit carries
    suggestions, each of them tried.

    Raises:
        ValueError: a count below 1, more tokens than the model has positions, or stages that
            cannot be (see `plan_stages`).
    """
    _check(model, question)
    limit = min(DEFAULT_MAX_TOKENS, model.max_positions or DEFAULT_MAX_TOKENS)
    if question.request.pinned is None:
        check_count(len(devices), len(model.blocks), question.request.choose_count)

    def fits(workload: Workload) -> bool:
        return can_plan(model, devices, formats, workload, question.request)

    num_sequences = question.num_sequences or 1
    max_tokens = question.max_tokens
    if max_tokens is None:
        max_tokens = largest(1, limit, lambda n: fits(question.workload(num_sequences, n))) or 1
    workload = question.workload(num_sequences, max_tokens)
    plan = plan_stages(model, devices, formats, workload, question.request)
    if not plan.fits:
        changes = _changes(model, devices, formats, replace(question, max_tokens=max_tokens))
        return replace(plan, suggestions=tuple(changes))
    if question.num_sequences is None:
        return _with_most_sequences(model, devices, formats, question, plan, max_tokens)
    return plan


def _with_most_sequences(
    model: memory.Model,
    devices: Sequence[Device],
    formats: memory.Formats,
    question: Question,
    plan: Plan,
    max_tokens: int,
) -> Plan:
    """The same cut for as many sequences as it has room for."""
    if plan.kv_tokens is None:
        return plan
    used = _find_devices(plan, devices)
    request = Request(pinned=tuple(len(stage.blocks) for stage in plan.stages))

    def fits(num_sequences: int) -> bool:
        workload = question.workload(num_sequences, max_tokens)
        return can_plan(model, used, formats, workload, request)

    most = min(MOST_SEQUENCES, max(1, plan.kv_tokens // max_tokens))
    num_sequences = max(1, largest(1, most, fits))
    settled = question.workload(num_sequences, max_tokens)
    settled_plan = plan_stages(model, used, formats, settled, request)
    if num_sequences == MOST_SEQUENCES:
        note = f"more than {MOST_SEQUENCES} sequences may fit; ask with --sequences"
        return replace(settled_plan, notes=(note,))
    return settled_plan


def _find_devices(plan: Plan, devices: Sequence[Device]) -> list[Device]:
    """The device of each stage: its name alone does not say, several stages may share one."""
    left = list(devices)
    used = []
    for stage in plan.stages:
        wanted = (stage.host, stage.device, stage.budget)
        device = next(d for d in left if (d.host, d.name, d.budget) == wanted)
        left.remove(device)
        used.append(device)
    return used


def _check(model: memory.Model, question: Question) -> None:
    for key, value, hint in (
        ("sequences", question.num_sequences, "leave it out for as many as fit"),
        ("context", question.max_tokens, "leave it out for as much as fits"),
        ("prefill_chunk", question.prefill_chunk, "512 is the default"),
        ("micro_batches", question.num_micro_batches, "leave it out for one a stage"),
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
    """The largest number of least..most that fits, by bisection; 0 if not even `least` does."""
    if not fits(least):
        return 0
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _changes(
    model: memory.Model, devices: Sequence[Device], formats: memory.Formats, question: Question
) -> Iterator[str]:
    """Single changes that make it fit, the cheapest first; each one has been tried."""
    num_sequences = question.num_sequences or 1
    max_tokens, request = question.max_tokens or 1, question.request
    workload = question.workload(num_sequences, max_tokens)

    def fits(
        *,
        devices: Sequence[Device] = devices,
        formats: memory.Formats = formats,
        workload: Workload = workload,
        request: Request = request,
    ) -> bool:
        if len(devices) > len(model.blocks):
            return False
        return can_plan(model, devices, formats, workload, request)

    free = replace(request, pinned=None)
    if request.pinned is not None and fits(request=free):
        yield "let the planner choose the stages instead of pinning them"
    in_int8 = replace(formats, int8=True)
    in_int8 = replace(in_int8, head_int8=in_int8.is_int8("lm_head"))
    if not formats.int8 and fits(formats=in_int8):
        yield "keep the linear layers in int8 (int8: true)"
    head = replace(formats, head_int8=True)
    embedding = replace(formats, embedding_int8=True)
    for changed, what in (
        (head, "an int8 head"),
        (embedding, "an int8 embedding"),
        (replace(head, embedding_int8=True), "an int8 head and embedding"),
    ):
        if changed != formats and fits(formats=changed):
            yield f"take {what} ({_hint(changed, formats)})"
            break
    if not formats.kv_int8 and fits(formats=replace(formats, kv_int8=True)):
        yield "take an int8 KV cache (--kv int8)"
    chunk = largest(
        1, question.prefill_chunk, lambda n: fits(workload=replace(workload, prefill_chunk=n))
    )
    if chunk:
        yield f"cut prompts into chunks of {chunk} instead of {question.prefill_chunk} tokens"
    fewer = largest(1, num_sequences, lambda n: fits(workload=question.workload(n, max_tokens)))
    if fewer:
        yield f"lower sequences from {num_sequences} to {fewer}"
    shorter = largest(1, max_tokens, lambda n: fits(workload=question.workload(num_sequences, n)))
    if shorter:
        yield f"shorten the context from {max_tokens} to {shorter} tokens"
    reserve = max(device.reserve for device in devices)
    if reserve and fits(devices=_with_reserve(devices, 0)):
        lower = largest(0, reserve, lambda n: fits(devices=_with_reserve(devices, n)))
        yield f"lower the reserve from {format_bytes(reserve)} to {format_bytes(lower)}"
    if not request.choose_count and fits(request=replace(free, choose_count=True)):
        yield "leave devices without a stage (--stages auto)"
    for more in range(1, len(model.blocks) - len(devices) + 1):
        if fits(devices=[*devices, *[devices[-1]] * more], request=free):
            noun = "device" if more == 1 else "devices"
            yield f"add {more} more {noun} like {devices[-1].name}: {len(devices) + more} in all"
            break
    yield from _larger_budgets(devices, lambda changed: fits(devices=changed))


def _with_reserve(devices: Sequence[Device], reserve: int) -> list[Device]:
    return [replace(device, reserve=min(device.reserve, reserve)) for device in devices]


def _larger_budgets(
    devices: Sequence[Device], fits: Callable[[Sequence[Device]], bool]
) -> Iterator[str]:
    """The least budget with which it fits: of the one device that is too small, or of each."""
    budgets = [device.budget for device in devices]

    def smallest(of: Callable[[int], Sequence[Device]]) -> int | None:
        if not fits(of(_MOST_BYTES)):
            return None
        return _MOST_BYTES - largest(0, _MOST_BYTES, lambda less: fits(of(_MOST_BYTES - less)))

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
