"""One rank that `load()` started in a plain Python session (`distributed.interpreter` says how).

Reads its settings as one line of JSON from standard input and joins; when that pipe closes, rank 0
is gone and this process ends too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from dist_int8.distributed.children import leave_report
from dist_int8.distributed.launchers import ask_for_death_with_parent
from dist_int8.distributed.states import StateReport
from dist_int8.launcher import logs, signals


def _end_with_rank_0() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would still be held when Python shuts down
        pass
    os._exit(1)


def _be_killed_with_rank_0() -> None:
    """Asks the kernel to kill this process when rank 0's main thread ends, even if it is stopped.

    The thread above cannot run in a stopped process. Linux only; elsewhere that thread has to do.
    """
    if os.environ.get("DIST_INT8_DIES_WITH_PARENT"):
        ask_for_death_with_parent()()


def main() -> None:
    """Joins as the rank in the environment and serves its stage until rank 0 shuts down."""
    _be_killed_with_rank_0()
    logs.configure()
    settings = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_rank_0, name="end-with-rank-0", daemon=True).start()
    signals.leave_term_to_rank_0(settings["drain_timeout"])
    try:
        from dist_int8.api.load import load

        load(**settings, progress=False)
    except Exception as error:  # before it joined: afterwards load() itself tells rank 0
        folder, rank = Path(os.environ["DIST_INT8_FOLDER"]), int(os.environ["RANK"])
        with suppress(OSError):  # rank 0 is gone, and the folder with it
            leave_report(folder, rank, StateReport.of_error(error))
        sys.exit(1)
