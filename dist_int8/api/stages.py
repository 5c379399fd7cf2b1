"""One stage of a model as the settings ask for it: from a checkpoint, or made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from dist_int8.api.prepare import Prepared
from dist_int8.checkpoint import (
    Calibration,
    find_hot_columns,
    load_stage,
    random_stage,
    stage_bytes_to_read,
)
from dist_int8.engine import TokenSampler
from dist_int8.models import DecoderStage, ModelSpec
from dist_int8.partition import StagePlan
from dist_int8.pipeline.kv_cache import KVCache
from dist_int8.pipeline.stage import Stage


def build_stage(prepared: Prepared, rank: int, progress: bool) -> Stage:
    """The stage of a rank, with its KV cache."""
    settings, spec, limits, hot = (
        prepared.settings,
        prepared.spec,
        prepared.limits,
        prepared.hot,
    )
    place = prepared.plan.stages[rank]
    last = rank == len(prepared.plan.stages) - 1
    device = torch.device(place.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    first = rank == 0
    how: dict[str, Any] = {
        "first": first,
        "last": last,
        "device": device,
        "dtype": prepared.dtype,
        "outlier_rule": settings.outlier_rule,
        "outlier_threshold": settings.outlier_threshold,
        "int8": settings.int8,
        "skip": settings.skipped,
        "embedding_int8": settings.embedding == "int8",
        "max_tokens": limits.max_tokens,
    }
    if settings.random_weights:
        model = random_stage(
            spec,
            place.blocks,
            vocab_dtype=prepared.vocab_dtype,
            num_hot_columns=hot.num_columns,
            **how,
        )
    else:
        shows = progress and first
        given = (prepared.folder, spec, place, settings.allow_pickle, shows, how)
        if hot.calibration is not None:
            how["hot_columns"] = _find_hot_columns(*given, hot.calibration)
        model = _load_stage(*given)
    block = spec.blocks[0]
    kv_cache = KVCache(
        num_blocks=len(place.blocks),
        num_slots=limits.num_slots,
        num_kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        max_tokens=limits.max_tokens,
        dtype=prepared.dtype,
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
        desc=f"[rank {place.rank}] {verb}",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if shown else True,
        leave=False,
    )
