"""Keeping stdout for what was asked for, and naming it where it cannot be written."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Named(io.FileIO):
    """A descriptor whose write errors name it: a full disk is "[Errno 28]" by itself."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._shown = name

    def write(self, content: Any) -> int:
        """Writes bytes; an OSError has the name of the stream."""
        try:
            return super().write(content) or 0
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._shown) from None


def prepare_streams() -> None:
    """Makes stdin, stdout and stderr safe to use, whatever the shell did to them.

    A closed descriptor would be taken by the next file that is opened, and libraries print into it:
    /dev/null takes its place.

    Raises:
        OSError: stdout is closed, and there is nowhere to put what was asked for.
    """
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    for number in closed:
        found = os.open(os.devnull, os.O_RDWR)
        if found != number:
            os.dup2(found, number)
            os.close(found)
        os.set_inheritable(number, True)
    if 2 in closed or sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for good
    if 1 in closed or sys.stdout is None:
        raise OSError("stdout is closed; redirect it to a file or to /dev/null")
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Named(1, "stdout")),
        encoding=sys.stdout.encoding,
        errors=sys.stdout.errors,
        line_buffering=bool(sys.stdout.line_buffering),
    )


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


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
        named = io.BufferedWriter(_Named(kept, "stdout"))
        with io.TextIOWrapper(named, encoding="utf-8", errors="replace") as stdout:
            yield stdout
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def drop_stdout() -> None:
    """Lets go of a stdout that nobody reads or that is full: what is buffered is dropped."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
