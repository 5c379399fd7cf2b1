"""When each stage worked on what. Pure Python; imports nothing of ours.

Every stage notes when it started and ended a micro-batch, and the notes travel to rank 0 with the
micro-batch itself: no other messages, no files of other hosts. Times are of the wall clock, so on
several hosts a trace is as exact as their clocks agree; durations and utilisation do not depend on
it. On a GPU they are those of the host, which runs ahead of the device except where it samples.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

MAX_RECORDS = 100_000  # the oldest are forgotten


@dataclass(frozen=True)
class Record:
    """One micro-batch on its way through all stages.

    Attributes:
        step: counts submissions.
        kind: PREFILL or DECODE of pipeline.schedule.
        lane: the group of sequences it belongs to.
        num_tokens: rows.
        spans: (start, end) on every stage, nanoseconds of the wall clock.
    """

    step: int
    kind: str
    lane: int
    num_tokens: int
    spans: tuple[tuple[int, int], ...]


class Trace:
    """The records of a pipeline, in the order of submission."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque(maxlen=MAX_RECORDS)
        self._submitted: deque[tuple[int, str, int, int]] = deque()

    def submitted(self, step: int, kind: str, lane: int, num_tokens: int) -> None:
        """Notes what was submitted; `finished` completes the oldest."""
        self._submitted.append((step, kind, lane, num_tokens))

    def finished(self, spans: list[tuple[int, int]]) -> None:
        """Results come in the order of submission."""
        self.records.append(Record(*self._submitted.popleft(), tuple(spans)))

    def since(self, step: int) -> list[Record]:
        """The records of submissions after `step`."""
        return [record for record in self.records if record.step > step]


def utilisation(records: list[Record]) -> list[float]:
    """Share of the time from the first start to the last end that each stage worked, in [0, 1]."""
    if not records:
        return []
    begin = min(record.spans[0][0] for record in records)
    end = max(record.spans[-1][1] for record in records)
    stages = zip(*(record.spans for record in records), strict=True)
    return [sum(stop - start for start, stop in spans) / max(1, end - begin) for spans in stages]


def chrome(records: list[Record]) -> dict[str, Any]:
    """The records in the trace event format that chrome://tracing and Perfetto read.

    A row a stage, a slice a micro-batch (`D1` is a decode step of lane 1), and on rows between them
    the time from the end on one stage to the start on the next: transfer and waiting.
    """
    events: list[dict[str, Any]] = []
    if not records:
        return {"traceEvents": events, "displayTimeUnit": "ms"}
    zero = min(record.spans[0][0] for record in records)
    num_stages = len(records[0].spans)
    for stage in range(num_stages):
        rows = [(2 * stage, f"stage {stage}"), (2 * stage + 1, f"{stage} -> {stage + 1}")]
        for row, name in rows[: 2 if stage + 1 < num_stages else 1]:
            events.append(_event("M", "thread_name", row, args={"name": name}))
            events.append(_event("M", "thread_sort_index", row, args={"sort_index": row}))
    for record in records:
        name = f"{record.kind}{record.lane}"
        details = {"step": record.step, "tokens": record.num_tokens}
        for stage, (start, end) in enumerate(record.spans):
            events.append(_slice(name, 2 * stage, start - zero, end - start, details))
            if stage + 1 < num_stages:
                wait = max(0, record.spans[stage + 1][0] - end)
                events.append(_slice(name, 2 * stage + 1, end - zero, wait, details))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(phase: str, name: str, row: int, **more: Any) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": 0, "tid": row, **more}


def _slice(name: str, row: int, start: int, duration: int, details: dict[str, int]) -> Any:
    return _event("X", name, row, ts=start / 1e3, dur=duration / 1e3, args=details)
