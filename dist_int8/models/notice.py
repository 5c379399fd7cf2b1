"""What a user should know of a model that loads all the same: logged once, by one rank."""

import functools
import logging
import os


@functools.lru_cache(maxsize=1024)  # a checkpoint is opened many times
def warn_once(logger: logging.Logger, message: str) -> None:
    """Logs a warning, once per process; of several ranks, which read the same, only rank 0 does."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", message)
