"""What config.json says of int8 weights, and the tensors that contradict it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_int8.checkpoint.located import Located
from dist_int8.checkpoint.reader import CheckpointReader
from dist_int8.models.json_file import read_json


def read_declared(folder: Path) -> Mapping[str, Any]:
    """Reads our own quantization_config of a folder; empty where it has none."""
    path = folder / "config.json"
    written = (read_json(path) if path.is_file() else {}).get("quantization_config")
    if isinstance(written, dict) and written.get("quant_method") == "dist_int8":
        return written
    return {}


def find_contradictions(reader: CheckpointReader, located: Mapping[str, Located]) -> list[str]:
    """Finds linears without the hot columns or the rotation that config.json says.

    int8 weights leave the hot columns out and mean nothing without their rotation.
    """
    declared = read_declared(reader.folder)
    if not declared:
        return []
    problems = []
    for target, entry in located.items():
        if not entry.is_int8 or not target.startswith(("blocks.", "lm_head.")):
            continue
        key = "head_hot_columns" if target == "lm_head.weight" else "num_hot_columns"
        if target.endswith(".down.weight") and "down_hot_columns" in declared:
            key = "down_hot_columns"
        for count in (declared.get(key, 0), declared.get("rotation", 0)):
            if not isinstance(count, int):
                return [f"config.json: {key} and rotation must be numbers, got {count!r}"]
        problems += _compare_hot_columns(entry, key, declared.get(key, 0))
        problems += _compare_rotation(entry, declared.get("rotation", 0))
    return problems


def _compare_hot_columns(entry: Located, key: str, count: int) -> list[str]:
    piece = entry.pieces[0]
    wanted = min(count, piece.shape[1])
    found = 0 if entry.hot_columns is None else len(entry.hot_columns)
    if found >= wanted:
        return []
    base = piece.name.removesuffix("weight")
    return [
        f"{base}hot_columns and {base}hot_weight must have {wanted} columns, as config.json says "
        f"({key}), got {found}"
    ]


def _compare_rotation(entry: Located, wanted: int) -> list[str]:
    how = f"be rotated in blocks of {wanted}" if wanted else "not be rotated"
    return [
        f"{piece.name} must {how}, as config.json says (rotation), got {piece.rotation}"
        for piece in entry.pieces
        if piece.rotation != wanted
    ]
