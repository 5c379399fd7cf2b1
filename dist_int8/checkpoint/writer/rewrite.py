"""`quantize` and `dequantize`: a checkpoint from one form into another, tensor by tensor.

Source and target may be floating, ours or bitsandbytes'. What is int8 in both keeps its values.
Tensors keep transformers' names, one checkpoint linear each, so the result does not depend on how
our blocks join them or on any number of stages.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dist_int8.checkpoint.calibrate import OFF, make_calibration
from dist_int8.checkpoint.tied_head import EMBEDDING, HEAD
from dist_int8.checkpoint.writer.job import Job
from dist_int8.checkpoint.writer.plan import FLOAT_NAMES, make_plan
from dist_int8.checkpoint.writer.stored_model import StoredModel
from dist_int8.checkpoint.writer.target import Target, TargetFormat
from dist_int8.int8.rotation import check_rotation
from dist_int8.models.linear_names import resolve_skip

SHARD_BYTES = 2 * 1000**3

logger = logging.getLogger(__name__)


def quantize(
    folder: str | Path,
    out: str | Path,
    *,
    target: TargetFormat = "dist_int8",
    skip: Sequence[str] = ("lm_head",),
    embedding_int8: bool = False,
    hot_columns: Mapping[str, Sequence[int]] | None = None,
    calibrate: str = OFF,
    num_hot_columns: int = 16,
    down_hot_columns: int | None = None,
    rotation: int | None = None,
    accuracy: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> Job:
    """Plans an int8 checkpoint of a floating one, or of an int8 one in another form.

    Args:
        folder: of the source. If it is int8 already, its int8 values and its choice of linears are
            kept; bitsandbytes has neither hot columns nor rotation, so that linears with them are
            rounded a second time for it, with a warning.
        out: new folder.
        target: "dist_int8" or "bitsandbytes" (loads in transformers).
        skip: linears that stay floating, by components of their names, ours or the checkpoint's.
        embedding_int8: the token embedding too, if the source is floating.
        hot_columns: input features to keep exactly, by our name of a linear ("blocks.0.qkv").
        calibrate: or find them with "random" tokens or a text file, block by block, when the job
            runs; see `calibrate.find_hot_columns`.
        num_hot_columns: of each linear that calibration finds.
        down_hot_columns: of each `down`; None: as many.
        rotation: requested block size of the rotation of linears (not of the embedding), 0 or a
            power of two up to 1024; None: 0, or that of a source that is int8.
        accuracy: named point of `config.accuracy` that is noted for `load()`; None: the default.
        shard_bytes: size of the files; a tensor alone may be larger.
        device: where rows are quantized.
        allow_pickle: read `.bin` files where there is no safetensors file.

    Raises:
        ValueError: a damaged checkpoint, or arguments that do not fit it.
    """
    source = StoredModel(Path(folder), allow_pickle)
    skip = resolve_skip(source.spec, skip, "quantize:skip")
    if source.is_int8 and (hot_columns or calibrate != OFF):
        raise ValueError(
            f"{folder}: hot_columns must be chosen when a checkpoint is quantized, got them "
            "for one that is int8 already; start from the floating checkpoint"
        )
    rotation = _choose_rotation(source, target, rotation)
    counts = num_hot_columns, down_hot_columns
    calibration = make_calibration(folder, source.spec, calibrate, *counts)
    if calibration is not None and hot_columns:
        raise ValueError(
            f"quantize: calibrate must be off where hot_columns are given, got {calibrate!r}; "
            "leave one out"
        )
    quantized = _choose_quantized(source, target, skip, embedding_int8)
    by_parameter = {f"{name}.weight": columns for name, columns in (hot_columns or {}).items()}
    wanted = Target(target, quantized, by_parameter, calibration, rotation, accuracy)
    _check_bitsandbytes(source, wanted)
    _check_hot_columns(source, wanted)
    _warn_of_second_rounding(source, wanted)
    return Job(make_plan(source, wanted, Path(out), shard_bytes), source, _parse_device(device))


def dequantize(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> Job:
    """Plans a floating checkpoint of an int8 one, ours or bitsandbytes' in any layout.

    Args:
        folder: of the int8 checkpoint.
        out: new folder.
        dtype: float32, float16 or bfloat16; None: that of the source's config.
        shard_bytes: as in `quantize`.
        device: where rows are dequantized.
        allow_pickle: as in `quantize`.

    Raises:
        ValueError: a damaged checkpoint or one without int8 weights.
    """
    source = StoredModel(Path(folder), allow_pickle)
    if not source.is_int8:
        raise ValueError(
            f"{folder}: checkpoint must have int8 weights, got none; it is floating-point already"
        )
    chosen = dtype or source.dtype
    if chosen not in FLOAT_NAMES:
        raise ValueError(
            f"dequantize: dtype must be one of {', '.join(FLOAT_NAMES)}, got {chosen!r}; choose one"
        )
    wanted = Target("floating", dtype=chosen)
    return Job(make_plan(source, wanted, Path(out), shard_bytes), source, _parse_device(device))


def _choose_quantized(
    source: StoredModel, form: TargetFormat, skip: Sequence[str], embedding_int8: bool
) -> set[str]:
    """Chooses the parameters that are int8 in the target: an int8 source has decided."""
    if source.is_int8:
        quantized = {name for name, entry in source.located.items() if entry.is_int8}
    else:
        quantized = {*source.list_quantized(skip), *([EMBEDDING] if embedding_int8 else [])}
    return quantized - {EMBEDDING} if form == "bitsandbytes" else quantized


def _choose_rotation(source: StoredModel, form: TargetFormat, rotation: int | None) -> int:
    """Chooses the rotation of the target's linears: an int8 source has decided."""
    check_rotation(rotation or 0)
    if form == "bitsandbytes" and rotation:
        raise ValueError(
            f"quantize: rotation must be 0 for bitsandbytes, which has none, got {rotation}; leave "
            "it out or write the dist_int8 format"
        )
    if not source.is_int8 or form == "bitsandbytes":
        return rotation or 0
    by_rotation: dict[int, str] = {}
    for name, entry in source.located.items():
        if entry.is_int8 and name != EMBEDDING:
            by_rotation.setdefault(entry.rotation, name.removesuffix(".weight"))
    if len(by_rotation) > 1:
        shown = ", ".join(f"{size} in {name}" for size, name in sorted(by_rotation.items()))
        raise ValueError(
            f"{source.folder}: int8 linears must have one rotation, got {shown}; start from the "
            "floating checkpoint"
        )
    stored = next(iter(by_rotation), 0)
    if rotation not in (None, stored):
        raise ValueError(
            f"{source.folder}: rotation must be chosen when a checkpoint is quantized, got "
            f"{rotation} for one that is int8 already, with {stored}; start from the floating "
            "checkpoint"
        )
    return stored


def _warn_of_second_rounding(source: StoredModel, target: Target) -> None:
    """bitsandbytes' int8 values cannot be had from rotated ones without rounding again."""
    rounded = [
        name.removesuffix(".weight")
        for name in sorted(target.quantized)
        if source.located[name].rotation or source.located[name].hot_columns is not None
    ]
    if target.form == "bitsandbytes" and rounded:
        logger.warning(
            "%s: %d linear(s) with a rotation or hot columns are rounded a second time for "
            "bitsandbytes (%s, ...): quantize the floating-point checkpoint if you have it",
            *(source.folder, len(rounded), rounded[0]),
        )


def _check_bitsandbytes(source: StoredModel, target: Target) -> None:
    if target.form != "bitsandbytes":
        return
    if target.hot_columns or target.calibration:
        raise ValueError(
            "quantize: hot_columns must be left out for bitsandbytes, which has none; "
            "write the dist_int8 format"
        )
    if source.spec.tied_head and HEAD in target.quantized:
        raise ValueError(
            "quantize: skip must name lm_head for bitsandbytes, because the head is tied to "
            "the embedding; add it"
        )


def _check_hot_columns(source: StoredModel, target: Target) -> None:
    for name, columns in target.hot_columns.items():
        if name not in target.quantized:
            raise ValueError(
                f"quantize: hot_columns must name int8 linears, got {name.removesuffix('.weight')};"
                " names are those of blocks, as in blocks.0.qkv"
            )
        source.check_columns(name, columns)


def _parse_device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"checkpoint: device must be cpu or cuda:N, got {device!r}; leave it out for cpu"
        ) from None
