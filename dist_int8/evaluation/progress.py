"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress of a long measurement; a context manager.

    Args:
        total: number of units in all.
        unit: what is counted, in the singular.
        show: whether to show anything.
    """

    def __init__(self, total: int, unit: str, show: bool) -> None:
        self._total, self._done = total, 0
        self._begin = time.monotonic()
        self._last = -SECONDS_BETWEEN_LINES  # the first line comes at once
        self._lines = show and not sys.stderr.isatty()
        self._bar: tqdm[Any] = tqdm(
            total=total, unit=unit, disable=not show or self._lines, leave=False
        )

    def start(self, name: str) -> None:
        """Shows what is done from now on."""
        self._bar.set_description(name)
        self._say(f"{self._done / self._total:.0%} done, {name}")

    def add(self, count: int) -> None:
        """Counts units that are done."""
        self._done += count
        self._bar.update(count)

    def _say(self, what: str) -> None:
        now = time.monotonic()
        if self._lines and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            tqdm.write(f"eval: {what}, {now - self._begin:.0f} s so far", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
