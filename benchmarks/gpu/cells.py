"""Cells: measurements of one step, each tried once; one that fails or hangs costs itself alone.

An exception becomes a record and the next cell has its turn. Where the CUDA context is lost, or a
cell does not end, the process is of no more use: it exits with RESTART, and first_light.py starts
the step again with --skip-tried.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from records import Records

RESTART = 75  # exit status "start me again" (EX_TEMPFAIL of sysexits.h)
CELL_S = 30.0

Cell = dict[str, Any]


def is_lost() -> bool:
    """Whether the CUDA context of this process is broken: every later call would fail too."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def one_line(error: BaseException) -> str:
    """What was raised, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class Watchdog:
    """Ends this process with RESTART if its body does not end within limit_s.

    Args:
        limit_s: seconds.
        give_up: called before with the stack of the main thread, to write down what hung.
    """

    def __init__(self, limit_s: float, give_up: Callable[[str], None]) -> None:
        self._give_up = give_up
        self._timer = threading.Timer(limit_s, self._end)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        try:
            frame = sys._current_frames()[threading.main_thread().ident or 0]
            self._give_up("".join(traceback.format_stack(frame)))
        finally:
            os._exit(RESTART)


class Cells:
    """The cells of one step.

    Args:
        records: where they go: "trying" before, then a record of its kind, or "error".
        skip_tried: leave out cells that the file says were tried, whatever came of them: since
            the step was begun ("begin") or "ever"; None: try all.
    """

    def __init__(self, records: Records, skip_tried: str | None) -> None:
        self.records = records
        self._num_failed = 0
        tried = records.mine("trying", since_begin=skip_tried == "begin") if skip_tried else []
        self._tried = {_key(record["cell"]) for record in tried}

    def run(
        self, kind: str, cell: Cell, measure: Callable[[], Cell], limit_s: float = CELL_S
    ) -> Cell | None:
        """The cell with what `measure` found, recorded; None if it was tried before or failed."""
        if self.was_tried(cell):
            return None
        self.records.add("trying", cell=cell)
        found: Cell | None = None

        def give_up(stack: str) -> None:
            said = f"no result after {limit_s:g} s"
            self.records.add("error", cell=cell, error=said, message=stack)
            print(f"FAILED {_key(cell)}: {said}\n{stack}", flush=True)

        with self.guard(cell):
            with Watchdog(limit_s, give_up):
                found = {**cell, **measure()}
            self.records.add(kind, **found)
        return found

    def was_tried(self, cell: Cell) -> bool:
        return _key(cell) in self._tried

    @contextmanager
    def guard(self, cell: Cell) -> Iterator[None]:
        """Records an error of its body; ends the process where the CUDA context is lost."""
        try:
            yield
        except Exception as error:
            self._num_failed += 1
            said = one_line(error)
            self.records.add("error", cell=cell, error=said, message=traceback.format_exc())
            print(f"FAILED {_key(cell)}: {said}", flush=True)
            if is_lost():
                print("the CUDA context is lost", flush=True)
                raise SystemExit(RESTART) from None

    def status(self) -> int:
        """Exit status of the step: 1 if a cell failed since it was begun, restarts included."""
        return 1 if self._num_failed or self.records.mine("error", since_begin=True) else 0


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)
