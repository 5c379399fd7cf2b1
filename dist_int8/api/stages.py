"""One stage of a model as the settings ask for it: from a checkpoint, or made up."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch
from tqdm import tqdm

from dist_int8.api.prepare import Prepared
from dist_int8.checkpoint import (
    StageFormat,
    count_stage_bytes,
    find_hot_columns,
    load_stage,
    make_random_stage,
)
from dist_int8.engine import TokenSampler
from dist_int8.models import DecoderStage, StageSlice
from dist_int8.partition import StagePlan
from dist_int8.pipeline.graphs import CudaRecorder
from dist_int8.pipeline.kv_cache import KVCache
from dist_int8.pipeline.stage import Stage


def build_stage(prepared: Prepared, rank: int, progress: bool) -> Stage:
    """The stage of a rank, with its KV cache."""
    settings, spec, limits = prepared.settings, prepared.spec, prepared.limits
    place = prepared.plan.stages[rank]
    last = rank == len(prepared.plan.stages) - 1
    device = torch.device(place.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stage_slice = StageSlice(place.blocks, first=rank == 0, last=last)
    if settings.random_weights:
        model = make_random_stage(
            spec,
            stage_slice,
            _describe_format(prepared),
            device=device,
            vocab_dtype=prepared.vocab_dtype,
            num_hot_columns=prepared.hot.num_columns,
            down_hot_columns=prepared.hot.down_columns,
        )
    else:
        model = _load_stage(prepared, place, stage_slice, progress)
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
    stage = Stage(model, kv_cache, TokenSampler(limits, device) if last else None)
    if settings.cuda_graphs and device.type == "cuda" and kv_cache.has_gpu_kernel:
        stage.use_graphs(limits, CudaRecorder())
    return stage


def _describe_format(prepared: Prepared) -> StageFormat:
    settings = prepared.settings
    stage_format = StageFormat(
        dtype=prepared.dtype,
        int8=settings.int8,
        skip=settings.skipped,
        embedding_int8=settings.embedding == "int8",
        max_tokens=prepared.limits.max_tokens,
    )
    if not settings.int8:
        return stage_format
    numerics = settings.numerics
    return replace(
        stage_format,
        outlier_rule=numerics.outlier_rule,
        outlier_threshold=numerics.outlier_threshold,
        rotation=numerics.rotation,
    )


def _load_stage(
    prepared: Prepared, place: StagePlan, stage_slice: StageSlice, progress: bool
) -> DecoderStage:
    allow_pickle = prepared.settings.allow_pickle
    shows = progress and stage_slice.first
    hot_columns = None
    if prepared.hot.calibration is not None:
        hot_columns = _find_hot_columns(prepared, place, stage_slice, shows)
    num_bytes = count_stage_bytes(
        prepared.folder, prepared.spec, stage_slice, allow_pickle=allow_pickle
    )
    with _bar(place, "loading", num_bytes, shows) as bar:
        return load_stage(
            prepared.folder,
            prepared.spec,
            stage_slice,
            _describe_format(prepared),
            device=place.device,
            hot_columns=hot_columns,
            progress=bar.update,
            allow_pickle=allow_pickle,
        )


def _find_hot_columns(
    prepared: Prepared, place: StagePlan, stage_slice: StageSlice, shown: bool
) -> dict[str, list[int]]:
    """Finds the hot columns of this stage's linears.

    Every rank streams the blocks up to its own, at the same time: no rank waits for another, not
    even when one is restarted.
    """
    assert prepared.hot.calibration is not None
    allow_pickle = prepared.settings.allow_pickle
    before = StageSlice(range(place.blocks.stop), first=True, last=False)
    num_bytes = count_stage_bytes(prepared.folder, prepared.spec, before, allow_pickle=allow_pickle)
    with _bar(place, "calibrating", num_bytes, shown) as bar:
        return find_hot_columns(
            prepared.folder,
            prepared.spec,
            prepared.hot.calibration,
            stage_slice,
            skip=prepared.settings.skipped,
            device=place.device,
            dtype=prepared.dtype,
            allow_pickle=allow_pickle,
            progress=bar.update,
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
