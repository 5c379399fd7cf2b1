"""Records: one JSON object per line, appended the moment it exists.

A line is one write, so a process that is killed loses at most the line that it was writing: `read`
leaves such a torn end out, and who writes next cuts it off. Needs nothing but Python, so that it
works where torch does not.
"""

import argparse
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SINCE = ("begin", "ever")  # what counts as tried: in this run of the step, or in any
SOURCES = {".txt", ".cpp", ".cu", ".cuh", ".h"}
MOST_TEXT = 2000  # characters of a message that a record keeps, from its end


class Records:
    """Where one step of `first_light.py` puts what it finds; without a file it keeps nothing.

    Args:
        path: file to append to.
        step: name of the step, in every record.
    """

    def __init__(self, path: Path | None, step: str) -> None:
        self.path, self.step = path, step
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, **fields: Any) -> None:
        """Appends {"step", "kind", **fields}; strings keep their last MOST_TEXT characters."""
        if self.path is None:
            return
        record = {"step": self.step, "kind": kind, **{k: _short(v) for k, v in fields.items()}}
        line = json.dumps(record, default=str) + "\n"
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _cut_torn_end(file)
            os.write(file, line.encode())
        finally:
            os.close(file)

    def mine(self, kind: str, since_begin: bool = False) -> list[dict[str, Any]]:
        """This step's records of a kind; since it was begun last, or of all calls."""
        if self.path is None:
            return []
        found: list[dict[str, Any]] = []
        for record in read(self.path):
            if since_begin and record["kind"] == "begin" and record["name"] == self.step:
                found = []
            elif record["step"] == self.step and record["kind"] == kind:
                found.append(record)
        return found


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without a torn last line; none where there is no file.

    Raises:
        ValueError: another line is no record.
    """
    return list(_parsed(path)) if path.exists() else []


def _parsed(path: Path) -> Iterator[dict[str, Any]]:
    *lines, _ = path.read_bytes().split(b"\n")  # behind the last line end there is only a torn one
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], str) or not isinstance(record["kind"], str):
                raise TypeError("step and kind are no names")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}:{number}: a line must be a record with step and kind ({error}); give a "
                "results.jsonl of first_light.py"
            ) from None
        yield record


def _cut_torn_end(file: int) -> None:
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.ftruncate(file, os.pread(file, size, 0).rfind(b"\n") + 1)


def _short(value: Any) -> Any:
    return value[-MOST_TEXT:] if isinstance(value, str) else value


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file that is whole at any moment, however this process ends."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def sources_digest() -> str:
    """sha256 of what the library is compiled from, names and bytes."""
    files = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*")]
    return _digest(path for path in files if path.suffix in SOURCES)


def tree_digest() -> str:
    """sha256 of what the steps run but the library: a copy without its commit is known by it."""
    folders = [ROOT / "dist_int8", ROOT / "benchmarks" / "gpu", ROOT / "tests" / "gpu"]
    return _digest(path for folder in folders for path in folder.rglob("*.py"))


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make_parser(documentation: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every measuring step takes."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes: measures nothing")
    parser.add_argument("--records", type=Path, help="file of JSON lines to append figures to")
    parser.add_argument(
        "--skip-tried",
        choices=SINCE,
        help="leave out what --records says was tried, since the step was begun or ever",
    )
    return parser


def commit() -> str:
    """The commit of this tree; empty where nobody can tell."""
    return _git("rev-parse", "HEAD") or ""


def is_clean() -> bool | None:
    """Whether the tree is that of the commit; None where nobody can tell."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return None if changed is None else not changed


def _git(*arguments: str) -> str | None:
    """What git prints; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
