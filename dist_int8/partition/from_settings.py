"""From settings to a plan: the one way in which `load()` and `dist-int8 plan` use the planner."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_int8.config import DEFAULT_MAX_TOKENS, ProfileSettings, Settings, read_yaml
from dist_int8.partition import (
    PROFILES,
    CutOptions,
    Device,
    DeviceProfile,
    Formats,
    Plan,
    Question,
    ask,
    check,
)
from dist_int8.partition.formats import adopt_declared, choose_formats_for, describe_formats
from dist_int8.partition.gpus import probe
from dist_int8.partition.profiles import DEFAULT_GPU

# What a CUDA process takes from its budget on top of the tensors that the plan counts: cuBLAS
# workspaces, the allocator's rounding, NCCL's buffers. The CUDA context does not count against a
# nominal size: a GPU sold as 40 GB (40e9 bytes) reports 39.4 GiB (42.3e9).
CUDA_RESERVE = 256 * 1024**2
# What CUDA takes from a GPU's free memory before the first tensor.
CUDA_CONTEXT_BYTES = 1024**3


@dataclass(frozen=True)
class PlanRequest:
    """What `dist-int8 plan` takes on top of the settings.

    Attributes:
        num_sequences: number of sequences that must fit; None: not given.
        max_tokens: number of tokens per sequence that must fit; None: not given.
        like_load: whether a number that is not given is what `load()` would reserve; otherwise it
            is as many as fit.
        choose_count: whether devices may stay unused.
    """

    num_sequences: int | None = None
    max_tokens: int | None = None
    like_load: bool = False
    choose_count: bool = False


def answer(settings: Settings, options: PlanRequest, config: Any, spec: Any, source: str) -> Plan:
    """Plans from a model's config alone, without weights and for devices that need not exist.

    Raises:
        ValueError: the settings or options make no sense for this model.
    """
    names = settings.devices
    if names is None:
        num_gpus, num_hosts = settings.gpus or 1, len(settings.hosts or [""])
        names = [f"cuda:{rank % max(1, num_gpus // num_hosts)}" for rank in range(num_gpus)]
    try:
        settings = adopt_declared(settings, config)
    except ValueError as error:
        raise ValueError(f"{source}:{error}") from None
    formats = choose_formats_for(settings, config, names)
    question = _make_question(settings, options, spec, names)
    devices = describe_devices(settings, names, source=source)
    check(spec, devices, question)  # wrong values come before those that are missing
    budgets = None
    if settings.memory is None and settings.profile is not None:
        budgets = [device.profile.memory_bytes for device in devices]
    elif settings.memory is None and any(name != "cpu" for name in names):
        raise ValueError(
            f"{source}:memory: memory must be given for GPUs that are not there, got none; write "
            "--memory 80GB or --profile a100-80"
        )
    devices = describe_devices(settings, names, budgets=budgets, source=source)
    plan = replace(
        ask(spec, devices, formats, question), numerics=describe_formats(settings, formats)
    )
    reserved = options.like_load and None in (options.num_sequences, options.max_tokens)
    return replace(plan, asked="reserved by load()") if reserved else plan


def _make_question(
    settings: Settings, options: PlanRequest, spec: Any, names: Sequence[str]
) -> Question:
    num_sequences, max_tokens = options.num_sequences, options.max_tokens
    if options.like_load:
        limit = spec.max_positions or DEFAULT_MAX_TOKENS
        num_sequences = settings.max_sequences if num_sequences is None else num_sequences
        if max_tokens is None:
            max_tokens = settings.max_tokens or min(DEFAULT_MAX_TOKENS, limit)
    return Question(
        num_sequences=num_sequences,
        max_tokens=max_tokens,
        prefill_chunk=settings.prefill_chunk,
        num_micro_batches=settings.micro_batches,
        records_steps=_records_steps(settings, names),
        options=replace(_cut_options(settings), choose_count=options.choose_count),
    )


def export_settings(settings: Settings, plan: Plan) -> dict[str, Any]:
    """Returns the settings that make `load()` run this plan, as YAML keys."""
    assert plan.workload is not None and plan.fits
    values = settings.model_dump(mode="json", exclude_defaults=True)
    for key in ("gpus", "devices", "stages", "memory", "hosts"):
        values.pop(key, None)
    stages = plan.stages
    values["devices"] = [stage.device for stage in stages]
    values["stages"] = [len(stage.blocks) for stage in stages]
    if stages[0].budget is not None:
        values["memory"] = [stage.budget for stage in stages]
    if settings.hosts is not None:
        values["hosts"] = [stage.host for stage in stages]
    values["max_sequences"] = plan.workload.num_sequences
    values["max_tokens"] = plan.workload.max_tokens
    return values


def describe_devices(
    settings: Settings,
    names: Sequence[str],
    *,
    budgets: Sequence[int | None] | None = None,
    hosts: Sequence[str] | None = None,
    source: str = "load()",
) -> list[Device]:
    """Describes the planner's devices: profile, budget, reserve and host of each stage.

    Args:
        names: device of every stage, "cpu" or "cuda:N".
        budgets: bytes for every stage, where the settings say nothing.
        hosts: host of every stage, where the settings say nothing.
        source: prefix of error messages.
    """
    profiles = _one_each("profile", settings.profile, len(names), source)
    if settings.hosts is not None:
        hosts = _spread(settings.hosts, len(names), source)
    devices = []
    for rank, (name, profile_name) in enumerate(zip(names, profiles, strict=True)):
        is_cpu = name == "cpu"
        budget = settings.find_budget(rank, name)
        if budget is None and budgets is not None:
            budget = budgets[rank]
        reserve = settings.reserve
        if reserve is None:
            reserve = 0 if is_cpu else CUDA_RESERVE
        devices.append(
            Device(
                name=name,
                profile=find_profile(profile_name or ("cpu" if is_cpu else DEFAULT_GPU), source),
                budget=budget,
                reserve=reserve,
                host=hosts[rank] if hosts is not None else "localhost",
            )
        )
    return devices


def free_budgets(names: Sequence[str]) -> list[int | None]:
    """Computes the budget of each stage on a visible GPU of this machine; None for the others.

    The budget is the GPU's free memory less a CUDA context, divided equally among its stages.
    """
    gpus = probe().gpus if any(name != "cpu" for name in names) else ()
    free = {f"cuda:{gpu.index}": gpu.free_bytes or gpu.total_bytes for gpu in gpus}
    return [
        max(1, free[name] // names.count(name) - CUDA_CONTEXT_BYTES) if name in free else None
        for name in names
    ]


def find_profile(name: str, source: str = "load()") -> DeviceProfile:
    """Returns a built-in profile by its name, or a measured one from its YAML file."""
    if name in PROFILES:
        return PROFILES[name]
    if not name.endswith((".yaml", ".yml")):
        raise ValueError(
            f"{source}:profile: profile must be one of {', '.join(PROFILES)} or a YAML file, "
            f"got {name!r}; measure one with `dist-int8 bench --profile FILE.yaml`"
        )
    if not Path(name).is_file():
        raise ValueError(
            f"{source}:profile: profile must be one of {', '.join(PROFILES)} or a YAML file, got "
            f"{name!r}, which is not there; check the path"
        )
    return DeviceProfile(**ProfileSettings.from_values(read_yaml(name), name).model_dump())


def make_plan(
    settings: Settings,
    model: Any,
    devices: Sequence[Device],
    formats: Formats,
    *,
    num_sequences: int,
    max_tokens: int,
) -> Plan:
    """Makes the plan that `load()` runs.

    Raises:
        ValueError: the model does not fit; the message says what to change.
    """
    question = Question(
        num_sequences=num_sequences,
        max_tokens=max_tokens,
        prefill_chunk=settings.prefill_chunk,
        num_micro_batches=settings.micro_batches,
        records_steps=_records_steps(settings, [device.name for device in devices]),
        options=_cut_options(settings),
    )
    plan = ask(model, devices, formats, question)
    if not plan.fits:
        raise ValueError(plan.refusal())
    return replace(plan, numerics=describe_formats(settings, formats))


def _records_steps(settings: Settings, names: Sequence[str]) -> bool:
    """Whether stages on GPUs record their decode steps."""
    on_gpu = any(name != "cpu" for name in names)
    return settings.cuda_graphs and on_gpu


def _cut_options(settings: Settings) -> CutOptions:
    return CutOptions(settings.objective, settings.pinned, prefill_ratio=settings.prefill_ratio)


def _one_each(
    key: str, values: Sequence[str] | None, count: int, source: str
) -> Sequence[str | None]:
    if values is None:
        return [None] * count
    if len(values) == 1:
        return list(values) * count
    if len(values) != count:
        raise ValueError(
            f"{source}:{key}: {key} must be one for all or one per device ({count}), got "
            f"{len(values)}; write one or {count}"
        )
    return values


def _spread(hosts: Sequence[str], count: int, source: str) -> list[str]:
    """Assigns `count` stages to hosts, the same number to each, in order."""
    if count % len(hosts):
        raise ValueError(
            f"{source}:hosts: hosts must divide the {count} stages, got {len(hosts)}; "
            "name one host per stage where they differ"
        )
    return [hosts[rank * len(hosts) // count] for rank in range(count)]
