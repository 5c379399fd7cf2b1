"""When a stage worked on a micro-batch, by the clock of its device.

The host runs ahead of a GPU: its own times would say when kernels were launched. There two events
mark begin and end on the stage's stream, and are read once the result of the micro-batch is there,
when nobody waits for them. Where a micro-batch goes on to another process before that, the times of
the host go with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

NS_PER_MS = 1e6
Span = tuple[int, int]  # (start, end), nanoseconds of the wall clock


@dataclass(frozen=True)
class LateSpan:
    """Begin and end of work on a GPU.

    Attributes:
        host: when the host began and ended to launch it.
        zero: an event, and when it happened.
        events: of the begin and the end.
    """

    host: Span
    zero: tuple[Any, int]
    events: tuple[Any, Any]

    def read(self) -> Span:
        """The times, once the work is done."""
        event, at = self.zero
        start, end = (at + round(NS_PER_MS * event.elapsed_time(other)) for other in self.events)
        return start, end


class StageClock:
    """Takes the time of one stage.

    Args:
        device: of the stage.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._zero: tuple[Any, int] | None = None

    def start(self) -> tuple[int, Any]:
        """Begins; `stop` takes what this returns."""
        if self._device.type != "cuda":
            return time.time_ns(), None
        if self._zero is None:  # the one wait: what the event means in wall-clock time
            torch.cuda.synchronize(self._device)
            self._zero = (self._record(), time.time_ns())
        return time.time_ns(), self._record()

    def stop(self, started: tuple[int, Any]) -> Span | LateSpan:
        """Ends what `start` began."""
        began, event = started
        if event is None:
            return began, time.time_ns()
        assert self._zero is not None
        return LateSpan((began, time.time_ns()), self._zero, (event, self._record()))

    def _record(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def read_spans(spans: list[Span | LateSpan]) -> list[Span]:
    """The spans of a micro-batch whose result is there."""
    return [span.read() if isinstance(span, LateSpan) else span for span in spans]


def host_spans(spans: list[Span | LateSpan]) -> list[Span]:
    """The spans of a micro-batch that goes on to another process."""
    return [span.host if isinstance(span, LateSpan) else span for span in spans]
