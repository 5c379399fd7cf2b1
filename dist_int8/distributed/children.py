"""The processes of the ranks that this one started."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dist_int8.distributed.owner import Owner
from dist_int8.distributed.states import StateReport

REAP_S = 0.5  # between a closed connection and the exit status of its process

_REPORT = "report-{rank}"


def leave_report(folder: Path, rank: int, report: StateReport) -> None:
    """Leaves why this rank ends where rank 0 finds it: there is no connection to it yet."""
    unfinished = folder / f".{_REPORT.format(rank=rank)}"
    unfinished.write_text(report.pack())
    unfinished.rename(folder / _REPORT.format(rank=rank))


_folders: set[Path] = set()  # of the rendezvous of this process, while they are there


def make_folder() -> Path:
    """A new folder in which ranks meet."""
    folder = Path(tempfile.mkdtemp(prefix="dist_int8-"))
    _folders.add(folder)
    return folder


def remove_folders() -> None:
    """Removes all that `make_folder` made, before a process ends without further ado."""
    for folder in list(_folders):
        shutil.rmtree(folder, ignore_errors=True)


class Children(dict[int, "subprocess.Popen[bytes]"]):
    """Processes by rank. In a forked child of this process nothing here ends them.

    Attributes:
        owner: the process that started them.
        start: starts one of them (again).
        folder: of their rendezvous; removed with them.
    """

    start: Callable[[int], None] | None = None
    folder: Path | None = None

    def __init__(self) -> None:
        super().__init__()
        self.owner = Owner()

    def let_go(self) -> None:
        """Closes, in a forked child, the pipes whose end tells the ranks that rank 0 is gone."""
        for child in self.values():
            if child.stdin:
                child.stdin.close()  # unbuffered, so that no lock is taken

    def describe_end(self, rank: int) -> str | None:
        """How a child ended; None while it runs, and for a rank that this process did not start."""
        child = self.get(rank)
        code = None if child is None else child.poll()
        if code is None:
            return None
        if code < 0:
            return f"died with signal {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def read_report(self, rank: int) -> StateReport | None:
        """What a child that ended before it joined left in the folder, by `leave_report`."""
        if self.folder is None:
            return None
        try:
            text = (self.folder / _REPORT.format(rank=rank)).read_text()
        except OSError:
            return None
        return StateReport.parse(text)

    def await_end(self, rank: int) -> str | None:
        """The same, a moment later: a connection closes before its process is reaped."""
        if rank in self:
            with suppress(subprocess.TimeoutExpired):
                self[rank].wait(REAP_S)
        return self.describe_end(rank)

    def kill(self) -> None:
        """Kills all of them, and waits for none."""
        if self.owner.is_here:
            for child in self.values():
                child.kill()

    def end(self, rank: int) -> None:
        """Kills one and waits for its end."""
        child = self.pop(rank, None) if self.owner.is_here else None
        if self.folder is not None:  # the next process of this rank leaves its own
            (self.folder / _REPORT.format(rank=rank)).unlink(missing_ok=True)
        if child is not None:
            child.kill()
            child.wait()
            if child.stdin:
                with suppress(OSError):
                    child.stdin.close()

    def end_all(self, timeout_s: float) -> None:
        """Waits for all to end by themselves, kills what is left and removes the folder."""
        if not self.owner.is_here:
            return
        deadline = time.monotonic() + timeout_s
        for rank in list(self):
            with suppress(subprocess.TimeoutExpired):
                self[rank].wait(max(0.0, deadline - time.monotonic()))
            self.end(rank)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            _folders.discard(self.folder)
            self.folder = None
