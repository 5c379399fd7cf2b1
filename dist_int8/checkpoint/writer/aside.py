"""The folder beside OUT that a checkpoint is made in, and what an interrupted run left there.

.OUT.partial/          beside OUT
    lock               held while a process works here
    job.json           what is being made, from which files
    hot_columns.json   what calibration found
    done/<shard>       sha256 of a finished shard
    model/             becomes OUT by one rename, when all of it is on the disk
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_int8.checkpoint.writer.durable import UNFINISHED, sync_folder, write_file

CONFIG = "config.json"


def as_json(value: object) -> bytes:
    """Encodes a value, always in the same bytes."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


class Aside:
    """The folder aside of `out`, an absolute path."""

    def __init__(self, out: Path) -> None:
        self.path = out.parent / f".{out.name}.partial"
        self.model = self.path / "model"
        self.hot_columns = self.path / "hot_columns.json"
        self._done = self.path / "done"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder and hold it for this process; the kernel lets go when the process ends.

        Raises:
            ValueError: the parent cannot be written, or another process holds it.
        """
        try:
            self.path.mkdir(exist_ok=True)
            opened = (self.path / "lock").open("w")
        except OSError as error:
            raise ValueError(
                f"{self.path}: OUT must be in a folder that can be written, got {error.strerror}; "
                "name another"
            ) from None
        with opened as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"{self.path}: one process must work here at a time, got a second; wait for "
                    "the first"
                ) from None
            yield

    def begin(self, identity: Mapping[str, Any], note: Callable[[str], object]) -> None:
        """Takes over what a run of the same identity left, or starts over."""
        path = self.path / "job.json"
        has_begun = self.model.is_dir()
        if has_begun and not (path.is_file() and path.read_bytes() == as_json(identity)):
            note(f"{self.path}: left by another job, starting over")
            has_begun = False
        if not has_begun:
            for folder in (self.model, self._done):
                shutil.rmtree(folder, ignore_errors=True)
            self.hot_columns.unlink(missing_ok=True)
            write_file(path, as_json(identity))
            self._done.mkdir()
            self.model.mkdir()
        elif num_done := len(list(self._done.glob("*.safetensors"))):
            note(f"{self.path}: continuing after {num_done} finished shard(s)")
        self.remove_unfinished()

    def remove_unfinished(self) -> None:
        """Removes the files that are not whole."""
        for unfinished in self.model.glob(f"*{UNFINISHED}"):
            unfinished.unlink()

    def get_sum(self, shard: str) -> str | None:
        """Returns the sha256 of a finished shard; None if it is not finished."""
        path = self._done / shard
        return path.read_text() if path.is_file() else None

    def finish_shard(self, writing: Path, shard: str, sum_of_file: str) -> None:
        """Gives a shard that is whole on the disk its name, then note it as done."""
        writing.rename(self.model / shard)
        sync_folder(self.model)
        write_file(self._done / shard, sum_of_file.encode())

    def become(self, out: Path) -> None:
        """Renames the finished model to `out`, which may be an empty folder."""
        self.model.rename(out)
        sync_folder(out.parent)
        self.remove()

    def remove(self) -> None:
        """Removes the folder aside, if it is there."""
        shutil.rmtree(self.path, ignore_errors=True)
