"""Log output of our own processes, the command line and the ranks: -q, -v and DIST_INT8_LOG.

An application that calls `load()` configures the logger `dist_int8` as it does any other.
"""

from __future__ import annotations

import logging
import os
import sys

from dist_int8.config.log_level import LEVELS, VARIABLE, read_log_level


def configure(verbosity: int | None = None) -> None:
    """Sends the records of `dist_int8` to stderr, here and in the ranks that this process starts.

    Args:
        verbosity: -1 errors only, 0 warnings too, 1 information too, 2 or more everything; None:
            the level that DIST_INT8_LOG names, by default warnings.

    Raises:
        ValueError: DIST_INT8_LOG names no level.
    """
    level = read_log_level() if verbosity is None else LEVELS[max(-1, min(2, verbosity))]
    os.environ[VARIABLE] = level
    logger = logging.getLogger("dist_int8")
    logger.setLevel(level)
    logger.propagate = False  # the root logger may have a handler of another library
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMATS[level == LEVELS[2]]))
    logger.handlers[:] = [handler]


_FORMATS = {False: "%(message)s", True: "%(asctime)s %(name)s: %(message)s"}
