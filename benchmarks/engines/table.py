"""What the records of a comparison say: medians, who leads, and shares of the machine."""

import statistics
from pathlib import Path
from typing import Any

from engines.catalogue import CELLS, ENGINES
from safetensors import safe_open

OURS = "dist_int8"


def count_multiplications(folder: Path) -> int:
    """Multiplications per prompt token in the linears of the blocks (not the head)."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                if name.endswith("_proj.weight"):
                    rows, columns = tensors.get_slice(name).get_shape()
                    count += rows * columns
    return count


def share_of_machine(
    cell: str, tokens_per_s: float, loaded: dict[str, Any], machine: dict[str, Any], macs: int
) -> float | None:
    """The part of what the machine can do that a figure needs.

    Decode with one sequence reads all weights per token, of the measured read bandwidth; prefill
    multiplies, of the measured int8 peak. Larger batches are bound by neither alone.
    """
    if "error" in machine:
        return None
    if cell == "decode-1":
        return tokens_per_s * loaded["weight_bytes"] / (machine["read_gb_per_s"] * 1e9)
    if CELLS[cell][0] == "prefill":
        return tokens_per_s * 2 * macs / (machine["int8_gops"] * 1e9)
    return None


def summarize_records(
    records: list[dict[str, Any]], conditions: list[Any], models: Path
) -> dict[str, Any]:
    """Medians of all figures under some conditions, per model, cell and engine."""
    mine = [one for one in records if one.get("conditions", conditions) == conditions]
    machine = next((one for one in reversed(mine) if one["kind"] == "machine"), {"error": "none"})
    summary: dict[str, Any] = {}
    for model in dict.fromkeys(one["model"] for one in mine if "model" in one):
        of_model = [one for one in mine if one.get("model") == model]
        macs = count_multiplications(models / model)
        loaded = {one["engine"]: one for one in of_model if one["kind"] == "loaded"}
        cells: dict[str, Any] = {}
        for one in of_model:
            if one["kind"] == "figure":
                samples = cells.setdefault(one["cell"], {}).setdefault(one["engine"], [])
                samples.append(one["tokens_per_s"])
        for cell, engines in cells.items():
            for engine, samples in engines.items():
                median = statistics.median(samples)
                share = share_of_machine(cell, median, loaded[engine], machine, macs)
                engines[engine] = {
                    "tokens_per_s": median,
                    "samples": len(samples),
                    "least": min(samples),
                    "most": max(samples),
                    "share_of_machine": share,
                }
        summary[model] = {
            "engines": {
                name: {key: one.get(key) for key in LOADED} for name, one in loaded.items()
            },
            "cells": cells,
            "failures": {
                f"{one['engine']}, {one['cell']}": one["error"]
                for one in of_model
                if one["kind"] == "failure" and one["engine"] not in cells.get(one["cell"], {})
            },
            "lost": lost_cells(cells),
        }
    return summary


LOADED = ("version", "weight_bytes", "resident_bytes", "load_s", "equal_answers", "agreement")


def lost_cells(cells: dict[str, Any]) -> dict[str, str]:
    """The cells in which another engine is faster than ours, and by how much."""
    lost = {}
    for cell, engines in cells.items():
        if OURS not in engines:
            continue
        first = max(engines, key=lambda name: engines[name]["tokens_per_s"])
        ratio = engines[OURS]["tokens_per_s"] / engines[first]["tokens_per_s"]
        if first != OURS:
            lost[cell] = f"{first}: ours is {ratio:.2f} of it"
    return lost


def format_table(summary: dict[str, Any]) -> str:
    """One Markdown table per model."""
    lines = []
    for model, figures in summary.items():
        cells = [cell for cell in CELLS if cell in figures["cells"]]
        lines += ["", f"| {model} | MB of weights | {' | '.join(cells)} | equal answers |"]
        lines.append("|---" * (len(cells) + 3) + "|")
        for engine in ENGINES:
            if engine in figures["engines"]:
                lines.append(_row(engine, figures, cells))
        lines += [f"- failed, {where}: {why}" for where, why in figures["failures"].items()]
        lines += [f"- lost, {cell}: {why}" for cell, why in figures["lost"].items()]
    return "\n".join(lines)


def _row(engine: str, figures: dict[str, Any], cells: list[str]) -> str:
    loaded = figures["engines"][engine]
    row = [engine, f"{loaded['weight_bytes'] / 1e6:,.0f}"]
    for cell in cells:
        one = figures["cells"][cell].get(engine)
        if one is None:
            row.append("failed" if f"{engine}, {cell}" in figures["failures"] else "")
            continue
        share = one["share_of_machine"]
        row.append(f"{one['tokens_per_s']:,.1f}" + (f" ({share:.0%})" if share else ""))
    row.append(f"{loaded['equal_answers']} of 3")
    return "| " + " | ".join(row) + " |"
