"""What a rewriting will write, as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_int8.checkpoint.calibrate import Calibration
from dist_int8.checkpoint.load import count_stage_bytes
from dist_int8.checkpoint.located import Located
from dist_int8.checkpoint.tied_head import EMBEDDING, HEAD
from dist_int8.checkpoint.writer.aside import CONFIG
from dist_int8.checkpoint.writer.formats import FloatingLinears, make_config
from dist_int8.checkpoint.writer.recipe import (
    Recipe,
    list_bitsandbytes_outputs,
    list_floating_outputs,
    list_int8_outputs,
)
from dist_int8.checkpoint.writer.shards import cut
from dist_int8.checkpoint.writer.stored_model import StoredModel
from dist_int8.checkpoint.writer.target import Target
from dist_int8.models.json_file import read_json
from dist_int8.models.stage_slice import StageSlice

FLOAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SMALL = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class RewritePlan:
    """Everything that goes into the new folder.

    Attributes:
        config: config.json.
        small_files: files to copy: tokenizer and so on.
        shards: the tensors of each file, and what they are made from.
        identity: what an interrupted run must have in common with this one to be continued.
        calibration: finds hot columns before anything is written; None: there are none to find.
        calibrates_head: whether it finds those of the head too.
        num_bytes_read: bytes that the calibration reads.
    """

    out: Path
    config: Mapping[str, Any]
    small_files: Sequence[Path]
    shards: Sequence[Sequence[Recipe]]
    identity: Mapping[str, Any]
    calibration: Calibration | None
    calibrates_head: bool
    num_bytes_read: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors to write."""
        return sum(recipe.num_bytes for shard in self.shards for recipe in shard)


def make_plan(source: StoredModel, target: Target, out: Path, shard_bytes: int) -> RewritePlan:
    """Plans the rewriting of a checkpoint.

    Args:
        source: the checkpoint to read.
        target: what to make of it.
        out: new folder.
        shard_bytes: size of the files; a tensor alone may be larger.
    """
    recipes = _list_recipes(source, target)
    shards = cut(recipes, shard_bytes)
    calibrated = {recipe.calibrated for recipe in recipes} - {None}
    calibration = target.calibration if calibrated else None
    calibrates_head = "lm_head" in calibrated
    config = make_config(
        read_json(source.folder / CONFIG),
        target,
        _list_floating_linears(source, target),
        calibration.num_hot_columns if calibration is not None and calibrates_head else 0,
    )
    return RewritePlan(
        out,
        config,
        _list_small_files(source.folder),
        shards,
        _identify(source.folder, config, shards, target),
        calibration,
        calibrates_head,
        0 if calibration is None else _count_bytes_to_calibrate(source),
    )


def _list_recipes(source: StoredModel, target: Target) -> list[Recipe]:
    return [
        recipe
        for parameter, entry in source.located.items()
        if target.changes(parameter)
        or not _is_the_embedding_again(source, target, parameter)  # transformers ties them
        for recipe in _list_recipes_of(source, target, parameter, entry)
    ]


def _list_recipes_of(
    source: StoredModel, target: Target, parameter: str, entry: Located
) -> list[Recipe]:
    is_quantized = parameter in target.quantized
    form = target.form if is_quantized else "floating"
    columns, num_hot = entry.hot_columns, None
    calibrated = None
    if parameter in target.hot_columns:
        columns = torch.tensor(target.hot_columns[parameter], dtype=torch.int32)
    elif target.calibration is not None and target.is_calibrated(parameter):
        calibrated = parameter.removesuffix(".weight")
        num_features = entry.pieces[0].shape[1]
        columns, num_hot = None, target.calibration.count(calibrated, num_features)
    if columns is not None:
        num_hot = len(columns)
    recipes, rotation = [], 0
    for piece, names in zip(entry.pieces, entry.source.names, strict=False):
        if form == "floating":
            dtype = target.dtype
            if dtype is None and piece.scale is not None:  # of a mixed matrix: not rounded again
                dtype = "float32" if entry.is_mixed else source.dtype
            stored = None if dtype is None else FLOAT_NAMES[dtype]
            outputs = list_floating_outputs(source.reader, piece, names[0], stored)
        elif form == "bitsandbytes":
            outputs = list_bitsandbytes_outputs(piece, names[0])
        else:
            rotation = target.find_rotation(parameter) if piece.scale is None else piece.rotation
            outputs = list_int8_outputs(source.reader, piece, names[0], num_hot, rotation)
        recipes.append(Recipe(form, piece, outputs, columns, rotation, calibrated))
    return recipes


def _is_the_embedding_again(source: StoredModel, target: Target, parameter: str) -> bool:
    if parameter != HEAD or not source.spec.tied_head:
        return False
    same_format = (HEAD in target.quantized) == (EMBEDDING in target.quantized)
    return same_format and source.located[HEAD].names == source.located[EMBEDDING].names


def _list_floating_linears(source: StoredModel, target: Target) -> FloatingLinears:
    names, modules = [], []
    for parameter, entry in source.located.items():
        if parameter in source.linears and parameter not in target.quantized:
            names.append(parameter.removesuffix(".weight"))
            # all names it may have: transformers itself renamed the head of GPT-NeoX
            modules += [
                name.removesuffix(".weight")
                for candidates in entry.source.names
                for name in candidates
            ]
    return FloatingLinears(names, modules)


def _list_small_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in _SMALL
        and not path.name.endswith(".index.json")
        and path.name != CONFIG
        and path.is_file()
    )


def _identify(
    folder: Path, config: Mapping[str, Any], shards: Sequence[Sequence[Recipe]], target: Target
) -> dict[str, Any]:
    return {
        "config": config,
        "tensors": [
            [
                [output.name, output.dtype, output.shape]
                for recipe in shard
                for output in recipe.outputs
            ]
            for shard in shards
        ],
        "hot_columns": {name: list(columns) for name, columns in target.hot_columns.items()},
        "source": {
            path.name: [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted(folder.iterdir())
            if path.is_file()
        },
    }


def _count_bytes_to_calibrate(source: StoredModel) -> int:
    stage_slice = StageSlice(range(source.spec.num_blocks), first=True, last=False)
    return count_stage_bytes(
        source.folder, source.spec, stage_slice, allow_pickle=source.allow_pickle
    )
