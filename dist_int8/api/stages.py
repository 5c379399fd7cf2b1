"""One stage of a model as the settings ask for it: from a checkpoint, or made up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from dist_int8.checkpoint import (
    OFF,
    Calibration,
    CheckpointReader,
    calibration_of,
    find_hot_columns,
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


@dataclass(frozen=True)
class HotColumns:
    """What a model's hot columns are, or are found with.

    Attributes:
        num_columns: the most of any linear of a block.
        head_columns: of an int8 head; None: as many.
        element_size: bytes of one of their weights.
        calibration: None: they are in the checkpoint, or made up, or there are none.
    """

    num_columns: int = 0
    element_size: int = 2
    calibration: Calibration | None = None
    head_columns: int | None = None


def as_stored(settings: Settings, folder: Path, spec: ModelSpec) -> tuple[Settings, HotColumns]:
    """The settings with what an int8 checkpoint has decided, and the hot columns.

    The whole checkpoint is looked through before any rank starts, not only this rank's stage.
    """
    if settings.random_weights:
        return settings, HotColumns(settings.num_hot_columns if settings.calibrates else 0)
    stored = stored_format(folder, spec, allow_pickle=settings.allow_pickle)
    if not settings.int8:
        return settings, HotColumns()
    if stored.is_int8:
        chosen = {
            "skip_modules": list(stored.skip),
            "head": None,
            "embedding": "int8" if stored.embedding_int8 else "16bit",
            "calibrate": OFF,
        }
        changed = settings.model_copy(update=chosen)
        hot = HotColumns(
            stored.num_hot_columns, stored.linear_size, head_columns=stored.head_hot_columns
        )
        return changed, hot
    if not settings.calibrates:
        return settings, HotColumns()
    count = settings.num_hot_columns
    calibration = calibration_of(folder, spec, settings.calibrate, count)
    return settings, HotColumns(count, stored.linear_size, calibration)


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
    hot: HotColumns,
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
        "skip": settings.skipped,
        "embedding_int8": settings.embedding == "int8",
        "max_tokens": limits.max_tokens,
    }
    if settings.random_weights:
        model = random_stage(
            spec, place.blocks, vocab_dtype=vocab_dtype, num_hot_columns=hot.num_columns, **how
        )
    else:
        shows = progress and first
        if hot.calibration is not None:
            how["hot_columns"] = _find_hot_columns(
                folder, spec, place, settings.allow_pickle, shows, how, hot.calibration
            )
        model = _load_stage(folder, spec, place, settings.allow_pickle, shows, how)
    block = spec.blocks[0]
    kv_cache = KVCache(
        num_blocks=len(place.blocks),
        num_slots=limits.num_slots,
        num_kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        max_tokens=limits.max_tokens,
        dtype=dtype,
        device=device,
        int8=settings.kv == "int8",
    )
    return Stage(model, kv_cache, TokenSampler(limits.max_tokens) if last else None)


def _find_hot_columns(
    folder: Path,
    spec: ModelSpec,
    place: StagePlan,
    allow_pickle: bool,
    progress: bool,
    how: dict[str, Any],
    calibration: Calibration,
) -> dict[str, list[int]]:
    """Of this stage's linears. Every rank streams the blocks up to its own, at the same time.

    No rank waits for another, also when one is started again.
    """
    num_bytes = stage_bytes_to_read(
        folder, spec, range(place.blocks.stop), first=True, last=False, allow_pickle=allow_pickle
    )
    with _bar(place, "calibrating", num_bytes, progress) as bar:
        return find_hot_columns(
            folder,
            spec,
            calibration,
            blocks=place.blocks,
            head=how["last"],
            skip=how["skip"],
            device=how["device"],
            dtype=how["dtype"],
            allow_pickle=allow_pickle,
            progress=bar.update,
        )


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
    with _bar(place, "loading", num_bytes, progress) as bar:
        return load_stage(
            folder, spec, place.blocks, progress=bar.update, allow_pickle=allow_pickle, **how
        )


def _bar(place: StagePlan, verb: str, num_bytes: int, shown: bool) -> tqdm[NoReturn]:
    return tqdm(
        total=num_bytes,
        desc=f"[rank {place.rank} stage {place.rank}] {verb}",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if shown else True,
        leave=False,
    )
