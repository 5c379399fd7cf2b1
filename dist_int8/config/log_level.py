"""DIST_INT8_LOG: how much our own processes log, wherever they are started."""

import os

VARIABLE = "DIST_INT8_LOG"
LEVELS = {-1: "ERROR", 0: "WARNING", 1: "INFO", 2: "DEBUG"}


def read_log_level() -> str:
    """Reads the level that the environment names, by default WARNING.

    Raises:
        ValueError: it names none.
    """
    level = (os.environ.get(VARIABLE) or LEVELS[0]).upper()
    if level not in LEVELS.values():
        names = ", ".join(level.lower() for level in LEVELS.values())
        raise ValueError(
            f"environment: {VARIABLE} must be one of {names}, got {os.environ[VARIABLE]!r}; "
            "unset it for warnings"
        )
    return level
