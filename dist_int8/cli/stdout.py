"""Keeping stdout for what was asked for."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def take_stdout() -> Iterator[TextIO]:
    """Yields our stdout as UTF-8 text while file descriptor 1 is stderr.

    gloo, deepspeed's logger, lm-eval and the other ranks print to file descriptor 1. What they
    print lands on stderr, and stdout holds only what the caller writes.
    """
    if sys.stdout is None:
        raise OSError("stdout is closed; redirect it to a file or to /dev/null")
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8", errors="replace") as stdout:
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
