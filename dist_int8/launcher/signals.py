"""SIGTERM to a rank: running requests finish, then everything ends with exit code 143.

For processes that are all ours: the command line and the ranks above 0. A Python session keeps its
own handlers, `load()` touches none; `Model.drain` is what it calls if it wants the same.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
AFTER_RANK_0_S = 5.0
_received: list[int] = []
logger = logging.getLogger(__name__)


def received() -> bool:
    """Whether SIGTERM was received since `drain_on_term`."""
    return bool(_received)


def drain_on_term(drain: Callable[[], object]) -> None:
    """The first SIGTERM calls `drain` in a thread of its own; the second ends the process at once.

    To be called in the main thread.
    """

    def begin() -> None:
        logger.warning("got SIGTERM: finishing what is running, accepting nothing new")
        drain()

    _handle(begin)


def leave_term_to_rank_0(drain_timeout_s: float) -> None:
    """Lets a rank above 0 serve on after SIGTERM while rank 0 drains, for a limited time.

    To be called in the main thread.
    """

    def outlast() -> None:
        time.sleep(drain_timeout_s + AFTER_RANK_0_S)
        os._exit(EXIT_CODE)

    _handle(outlast)


def end_on_term() -> None:
    """Lets SIGTERM, also one received already, end a rank that has failed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if received():
        os._exit(EXIT_CODE)


def _handle(first: Callable[[], object]) -> None:
    def on_term(signum: int, frame: FrameType | None) -> None:
        _received.append(signum)
        if len(_received) > 1:
            os._exit(EXIT_CODE)
        threading.Thread(target=first, name="term", daemon=True).start()

    signal.signal(signal.SIGTERM, on_term)
