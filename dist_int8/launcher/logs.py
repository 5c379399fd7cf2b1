"""Configures the log of the package: logger `dist_int8`, to stderr."""

import logging
import os

VARIABLE = "DIST_INT8_LOG"
_LEVELS = {-1: "ERROR", 0: "WARNING", 1: "INFO", 2: "DEBUG"}


def configure(verbosity: int | None = None) -> None:
    """Sets the level of the log in this process and, by the environment, in the other ranks.

    Args:
        verbosity: -1 errors, 0 warnings, 1 info, 2 debug; None: from DIST_INT8_LOG, else warnings.

    Raises:
        ValueError: DIST_INT8_LOG is no name of a level.
    """
    if verbosity is None:
        level = os.environ.get(VARIABLE, _LEVELS[0]).upper()
    else:
        level = _LEVELS[max(-1, min(verbosity, 2))]
    if level not in logging.getLevelNamesMapping():
        raise ValueError(
            f"{VARIABLE}: {VARIABLE} must be debug, info, warning or error, got {level!r}; "
            f"write {VARIABLE}=info"
        )
    logger = logging.getLogger("dist_int8")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
    os.environ[VARIABLE] = level.lower()
