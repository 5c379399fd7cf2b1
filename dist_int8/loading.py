"""One stage of a model as the settings ask for it: from a checkpoint, or made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dist_int8.checkpoint import (
    CheckpointReader,
    load_stage,
    random_stage,
    stage_bytes_to_read,
    stored_format,
)
from dist_int8.config import Settings
from dist_int8.engine import TokenSampler
from dist_int8.models import DecoderStage, ModelSpec, tensor_sources
from dist_int8.partition import Plan, StagePlan
from dist_int8.pipeline.kv_cache import KVCache
from dist_int8.pipeline.microbatch import Limits
from dist_int8.pipeline.stage import Stage


def as_stored(settings: Settings, folder: Path, spec: ModelSpec) -> tuple[Settings, int]:
    """The settings with what an int8 checkpoint has decided, and its most hot columns of a linear.

    The whole checkpoint is looked through before any rank starts, not only this rank's stage.
    """
    if settings.random_weights:
        return settings, 0
    stored = stored_format(folder, spec, allow_pickle=settings.allow_pickle)
    if stored is None or not settings.int8:
        return settings, 0
    chosen = {"skip_modules": list(stored.skip)}
    return settings.model_copy(update=chosen), stored.num_hot_columns


def vocab_dtype_of(
    settings: Settings, folder: Path, spec: ModelSpec, hf_config: Any, dtype: torch.dtype
) -> torch.dtype:
    """Of the embedding and the head, which below fp32 keep a 16-bit dtype."""
    if settings.random_weights:
        stored = hf_config.dtype or dtype
    else:
        reader = CheckpointReader(folder, allow_pickle=settings.allow_pickle)
        source = tensor_sources(spec, range(0), first=True, last=False)["embedding.weight"]
        name = next(name for name in source.names[0] if name in reader)
        stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(reader.dtype(name), dtype)
    return stored if dtype == torch.float32 and stored.itemsize == 2 else dtype


def build_stage(
    folder: Path,
    spec: ModelSpec,
    place: StagePlan,
    plan: Plan,
    settings: Settings,
    limits: Limits,
    dtype: torch.dtype,
    vocab_dtype: torch.dtype,
    progress: bool,
) -> Stage:
    """The stage of rank `place.rank`, with its KV cache."""
    last = place.rank == len(plan.stages) - 1
    device = torch.device(place.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    first = place.rank == 0
    how: dict[str, Any] = {
        "first": first,
        "last": last,
        "device": device,
        "dtype": dtype,
        "outlier_rule": settings.outlier_rule,
        "outlier_threshold": settings.outlier_threshold,
        "int8": settings.int8,
        "skip": tuple(settings.skip_modules),
        "max_tokens": limits.max_tokens,
    }
    if settings.random_weights:
        model = random_stage(spec, place.blocks, vocab_dtype=vocab_dtype, **how)
    else:
        model = _load_stage(folder, spec, place, settings.allow_pickle, progress and first, how)
    block = spec.blocks[0]
    kv_cache = KVCache(
        num_blocks=len(place.blocks),
        num_slots=limits.num_slots,
        num_kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        max_tokens=limits.max_tokens,
        dtype=dtype,
        device=device,
    )
    return Stage(model, kv_cache, TokenSampler(limits.max_tokens) if last else None)


def _load_stage(
    folder: Path,
    spec: ModelSpec,
    place: StagePlan,
    allow_pickle: bool,
    progress: bool,
    how: dict[str, Any],
) -> DecoderStage:
    num_bytes = stage_bytes_to_read(
        folder,
        spec,
        place.blocks,
        first=how["first"],
        last=how["last"],
        allow_pickle=allow_pickle,
    )
    with tqdm(
        total=num_bytes,
        desc=f"[rank {place.rank} stage {place.rank}] loading",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if progress else True,
        leave=False,
    ) as bar:
        return load_stage(
            folder, spec, place.blocks, progress=bar.update, allow_pickle=allow_pickle, **how
        )
