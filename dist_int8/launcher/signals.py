"""SIGTERM to a rank: running requests finish, then everything ends with exit code 143. And Ctrl-C.

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

from dist_int8.distributed.children import remove_folders

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


def end_on_second_interrupt() -> None:
    """Ctrl-C raises KeyboardInterrupt once; the next one ends the process at once and in silence.

    Else it would interrupt, with a traceback, whatever ends the model or Python itself. A handler
    that is not Python's own stays. To be called in the main thread.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _leave(signum: int, frame: FrameType | None) -> None:
    remove_folders()  # the ranks end by themselves
    os._exit(128 + signum)


def end_on_term() -> None:
    """Lets SIGTERM, also one received already, end a rank that has failed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if received():
        os._exit(EXIT_CODE)


def _handle(first: Callable[[], object]) -> None:
    def on_term(signum: int, frame: FrameType | None) -> None:
        _received.append(signum)
        if len(_received) > 1:
            remove_folders()
            os._exit(EXIT_CODE)
        threading.Thread(target=first, name="term", daemon=True).start()

    signal.signal(signal.SIGTERM, on_term)
