"""Finds what a stage is built from before a weight is read: settings, shape, formats, plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dist_int8.api.placement import Placement, check_host_memory
from dist_int8.api.prompts import ModelDefaults, PromptEncoder
from dist_int8.checkpoint import (
    OFF,
    Calibration,
    CheckpointReader,
    make_calibration,
    read_stored_format,
    resolve_model,
)
from dist_int8.config import DEFAULT_MAX_TOKENS, GenerationSettings, Settings
from dist_int8.config.generation_fields import read_model_defaults
from dist_int8.models import (
    ModelSpec,
    StageSlice,
    describe,
    load_config,
    resolve_skip,
    tensor_sources,
)
from dist_int8.models.generation_config import read_generation_config
from dist_int8.partition import Plan
from dist_int8.partition.formats import choose_formats, fix_numerics
from dist_int8.partition.from_settings import describe_devices, free_budgets, make_plan
from dist_int8.pipeline.microbatch import Limits

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HotColumns:
    """The hot columns of a model, or how to find them.

    Attributes:
        num_columns: the largest number in any linear of a block but `down`.
        down_columns: the largest number in `down`.
        element_size: bytes per weight.
        calibration: how to find them; None: they are in the checkpoint or random, or there are
            none.
        head_columns: number in an int8 head; None: num_columns.
    """

    num_columns: int = 0
    down_columns: int = 0
    element_size: int = 2
    calibration: Calibration | None = None
    head_columns: int | None = None


@dataclass(frozen=True)
class Prepared:
    """Everything that a stage is built from.

    Attributes:
        settings: the settings, with what an int8 checkpoint has decided.
        placement: where all stages and this process run.
        folder: folder of the checkpoint.
        spec: the model as data.
        encoder: turns prompts into requests, on rank 0.
        hot: the hot columns.
        dtype: dtype of hidden states and of parameters that are not int8.
        vocab_dtype: dtype of embedding and head, where they are not int8.
        limits: slots and tokens.
        plan: blocks and bytes of every stage.
    """

    settings: Settings
    placement: Placement
    folder: Path
    spec: ModelSpec
    encoder: PromptEncoder
    hot: HotColumns
    dtype: torch.dtype
    vocab_dtype: torch.dtype
    limits: Limits
    plan: Plan


def prepare(settings: Settings, placement: Placement) -> Prepared:
    """Finds the model, reads its config and plans its stages; no weight is read.

    Raises:
        ValueError: an unknown model, a damaged checkpoint or tokenizer, or a plan that does not
            fit.
    """
    assert settings.model is not None
    folder = resolve_model(
        settings.model,
        settings.revision,
        allow_pickle=settings.allow_pickle,
        weights=not settings.random_weights,
    )
    hf_config = load_config(folder)
    spec = describe(hf_config)
    skip = resolve_skip(spec, settings.skip_modules, "load(): skip_modules")
    if list(skip) != settings.skip_modules:
        settings = settings.model_copy(update={"skip_modules": list(skip)})
    limits = _choose_limits(settings, spec)
    encoder = _make_encoder(folder, hf_config, limits)
    if placement.rank == 0:
        encoder.check_tokenizer()
    settings, hot = adopt_stored_format(settings, folder, spec)
    dtype = _choose_dtype(settings, placement.devices, hf_config)
    vocab_dtype = _choose_vocab_dtype(settings, folder, spec, hf_config, dtype)
    plan = _make_plan(settings, placement, spec, hot, (dtype, vocab_dtype), limits)
    check_host_memory(plan, placement)
    if placement.rank == 0 and plan.numerics:
        _log.info(plan.numerics)
    return Prepared(
        settings, placement, folder, spec, encoder, hot, dtype, vocab_dtype, limits, plan
    )


def _make_plan(
    settings: Settings,
    placement: Placement,
    spec: ModelSpec,
    hot: HotColumns,
    dtypes: tuple[torch.dtype, torch.dtype],
    limits: Limits,
) -> Plan:
    # under a launcher each rank would see different free memory, and make a plan of its own
    budgets = None if placement.launched else free_budgets(placement.devices)
    return make_plan(
        settings,
        spec,
        describe_devices(settings, placement.devices, budgets=budgets, hosts=placement.hosts),
        replace(
            choose_formats(settings, *(dtype.itemsize for dtype in dtypes)),
            num_hot_columns=hot.num_columns,
            down_hot_columns=hot.down_columns,
            hot_size=hot.element_size,
            head_hot_columns=hot.head_columns,
        ),
        num_sequences=limits.num_slots,
        max_tokens=limits.max_tokens,
    )


def adopt_stored_format(
    settings: Settings, folder: Path, spec: ModelSpec
) -> tuple[Settings, HotColumns]:
    """Returns the settings with what an int8 checkpoint has decided, and the hot columns.

    The whole checkpoint is checked before any rank starts, not only this rank's stage.
    """
    if settings.random_weights:
        settings = _fix_numerics(settings)
        if not settings.calibrates:
            return settings, HotColumns()
        numerics = settings.numerics
        return settings, HotColumns(numerics.num_hot_columns, numerics.down_hot_columns)
    stored = read_stored_format(folder, spec, allow_pickle=settings.allow_pickle)
    if not settings.int8:
        return settings, HotColumns()
    if stored.is_int8:
        accuracy = settings.accuracy or stored.accuracy
        settings = _fix_numerics(
            settings.model_copy(update={"accuracy": accuracy}), stored.rotation
        )
        chosen = {
            "skip_modules": list(stored.skip),
            "head": None,
            "embedding": "int8" if stored.embedding_int8 else "16bit",
            "calibrate": OFF,
        }
        changed = settings.model_copy(update=chosen)
        hot = HotColumns(
            stored.num_hot_columns,
            stored.down_hot_columns,
            stored.linear_size,
            head_columns=stored.head_hot_columns,
        )
        return changed, hot
    settings = _fix_numerics(settings)
    if not settings.calibrates:
        return settings, HotColumns()
    counts = settings.numerics.num_hot_columns, settings.numerics.down_hot_columns
    calibration = make_calibration(folder, spec, settings.calibrate, *counts)
    return settings, HotColumns(*counts, stored.linear_size, calibration)


def _fix_numerics(settings: Settings, stored_rotation: int | None = None) -> Settings:
    """Returns the settings with what their point of accuracy stands for, for every rank."""
    try:
        return fix_numerics(settings, stored_rotation)
    except ValueError as error:
        raise ValueError(f"load():{error}") from None


def _choose_dtype(settings: Settings, devices: list[str], hf_config: Any) -> torch.dtype:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if devices[0] == "cpu":
        return torch.float32
    return hf_config.dtype or torch.float16


def _choose_vocab_dtype(
    settings: Settings, folder: Path, spec: ModelSpec, hf_config: Any, dtype: torch.dtype
) -> torch.dtype:
    """Chooses the dtype of embedding and head: the stored one if it has 16 bits."""
    if settings.random_weights:
        stored = hf_config.dtype or dtype
    else:
        reader = CheckpointReader(folder, allow_pickle=settings.allow_pickle)
        first = StageSlice(range(0), first=True, last=False)
        source = tensor_sources(spec, first)["embedding.weight"]
        name = next(name for name in source.names[0] if name in reader)
        stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(reader.float_dtype(name), dtype)
    return stored if dtype == torch.float32 and stored.itemsize == 2 else dtype


def _choose_limits(settings: Settings, spec: ModelSpec) -> Limits:
    max_tokens = settings.max_tokens
    if max_tokens is None:
        max_tokens = min(DEFAULT_MAX_TOKENS, spec.max_positions or DEFAULT_MAX_TOKENS)
    elif spec.max_positions is not None and max_tokens > spec.max_positions:
        raise ValueError(
            f"load(): max_tokens must be at most the model's {spec.max_positions} positions, "
            f"got {max_tokens}; {spec.limit_advice}"
        )
    return Limits(
        num_slots=settings.max_sequences,
        max_tokens=max_tokens,
        max_rows=settings.prefill_chunk + settings.max_sequences,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
    )


def _make_encoder(folder: Path, hf_config: Any, limits: Limits) -> PromptEncoder:
    """Reads what the model says of generating: its end tokens and its default settings."""
    generation = read_generation_config(folder)
    eos = None if generation is None else generation.eos_token_id
    if eos is None:
        eos = getattr(hf_config.get_text_config(), "eos_token_id", None)
    if eos is None:
        eos = getattr(hf_config, "eos_token_id", None)
    eos_token_ids = frozenset([] if eos is None else eos if isinstance(eos, list) else [eos])
    defaults = ModelDefaults()
    if generation is not None:
        source = str(folder / "generation_config.json")
        values, refusal = read_model_defaults(generation, source)
        values.pop("eos_token_id", None)  # it is with the model's end tokens
        GenerationSettings.from_generation_config(None, {}, values, source=source)
        defaults = ModelDefaults(values, refusal)
        if values or refusal:
            names = ", ".join(f"{name}={value!r}" for name, value in values.items())
            _log.info("%s: default settings of generate(): %s", source, names or "none")
        if refusal:
            _log.warning("generate() will refuse the model's defaults: %s", refusal)
    return PromptEncoder(folder, limits.vocab_size, limits.max_tokens, eos_token_ids, defaults)
