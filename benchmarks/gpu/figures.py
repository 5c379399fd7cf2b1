"""Records as they are read: how steps ended, what their last runs found, what cards measured."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import records

Record = dict[str, Any]


def last_ends(found: Iterable[Record]) -> dict[str, Record]:
    """How each step ended the last time it ran, by name; one that only began was interrupted."""
    ends: dict[str, Record] = {}
    for record in found:
        if record["kind"] == "begin":
            unknown = {"status": "interrupted", "seconds": 0.0, "last_line": "the call was ended"}
            ends[record["name"]] = {**record, **unknown}
        elif record["kind"] == "end" and (
            record["status"] != "not run" or record["name"] not in ends
        ):
            ends[record["name"]] = record
    return ends


def last_runs(found: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each step's last run, by its name."""
    runs: dict[str, list[Record]] = {}
    for record in found:
        if record["kind"] == "begin":
            runs[record["name"]] = []
        elif record["step"] != "first_light":
            runs.setdefault(record["step"], []).append(record)
    return runs


class Figures:
    """Records of real runs on GPUs, oldest first; a later record of the same thing wins."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.runs: list[Record] = []
        self.records: list[Record] = []
        for path in sorted(files):
            self._add(records.read(path))

    def _add(self, found: Sequence[Record]) -> None:
        named = (r["device"] for r in found if r["kind"] == "environment")
        unknown = next(named, "?")  # where there is no nvidia-smi
        is_real, card = False, unknown
        for record in found:
            if record["kind"] == "run":
                is_real = record["device"] == "cuda" and not record["small"]
                card = record["card"].split(",")[0] if record["card"] else unknown
                if is_real:
                    self.runs.append({**record, "card": card})
            elif is_real:
                self.records.append({**record, "card": card})

    def of(self, step: str, kind: str, *keys: str) -> list[Record]:
        """The last record for each value of card and keys."""
        found = {
            tuple(record.get(key) for key in ("card", *keys)): record
            for record in self.records
            if record["step"] == step and record["kind"] == kind
        }
        return list(found.values())

    def cards(self) -> list[str]:
        return list(dict.fromkeys(run["card"] for run in self.runs))

    def on(self, card: str) -> list[Record]:
        return [record for record in self.records if record["card"] == card]
