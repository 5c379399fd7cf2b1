"""What a run of first light left in its folder, for the tests of the runner and of rehearsals."""

import re
from xml.etree import ElementTree

import records

MOST_FILES, MOST_BYTES = 8, 4 << 20  # little enough to carry away by hand


def ends(folder):
    return {r["name"]: r for r in records.read(folder / "results.jsonl") if r["kind"] == "end"}


def statuses(folder):
    return {name: end["status"] for name, end in ends(folder).items()}


def assert_whole(folder):
    """Every file can be read, is small, and has a name that travels."""
    files = list(folder.iterdir())
    assert len(files) <= MOST_FILES
    for file in files:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", file.name) and file.stat().st_size < MOST_BYTES
        if file.suffix == ".xml":
            ElementTree.parse(file)
    return records.read(folder / "results.jsonl")
