"""When each stage worked on what. Pure Python; imports nothing of ours.

Every stage notes when it started and ended a micro-batch, and the notes travel to rank 0 with the
micro-batch itself: no other messages, no files of other hosts. Times are of the wall clock, so on
several hosts a trace is as exact as their clocks agree; durations and utilisation do not depend on
it. On a GPU they are those of the device (`clock`); where stages are processes, those of the host,
which runs ahead of it, on all but the last.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
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

    @property
    def last_step(self) -> int:
        """Step of the newest record; 0 if there is none."""
        return self.records[-1].step if self.records else 0

    def utilisation(self, since: int = 0) -> list[float]:
        """Share of the time that each stage worked on submissions after `since`, in [0, 1]."""
        return utilisation(self.since(since))

    def save(self, path: str | Path, since: int = 0) -> None:
        """Writes what was submitted after `since` as a trace for chrome://tracing and Perfetto."""
        file = Path(path).expanduser()
        try:
            file.write_text(json.dumps(chrome(self.since(since))))
        except OSError as error:  # one of a full disk has no name of a file
            raise OSError(error.errno, error.strerror, str(file)) from None

    def forget_submitted(self) -> None:
        """Drops what was submitted and will not finish."""
        self._submitted.clear()

    def since(self, step: int) -> list[Record]:
        """The records of submissions after `step`."""
        # of a copy: a step of another call, or of one that was interrupted, may end meanwhile
        return [record for record in list(self.records) if record.step > step]


def utilisation(
    records: list[Record], begin: int | None = None, end: int | None = None
) -> list[float]:
    """Share of the time that each stage worked, in [0, 1].

    Args:
        records: of one pipeline.
        begin, end: nanoseconds; by default from the first start to the last end.
    """
    if not records:
        return []
    begin = min(record.spans[0][0] for record in records) if begin is None else begin
    end = max(record.spans[-1][1] for record in records) if end is None else end
    stages = zip(*(record.spans for record in records), strict=True)
    return [
        sum(max(0, min(stop, end) - max(start, begin)) for start, stop in spans)
        / max(1, end - begin)
        for spans in stages
    ]


def steady(records: list[Record]) -> tuple[list[Record], int, int]:
    """Returns the longest period of pure decoding: its records, begin and end.

    It begins when the last stage starts the first of them and ends when stage 0 finishes the last,
    so that filling and draining the pipeline do not count. Nothing decoded: ([], 0, 0).
    """
    longest: list[Record] = []
    for kind, group in groupby(records, key=lambda record: record.kind):
        run = list(group)
        if kind == "D" and len(run) > len(longest):
            longest = run
    if not longest:
        return [], 0, 0
    return longest, longest[0].spans[-1][0], longest[-1].spans[0][1]


def chrome(records: list[Record]) -> dict[str, Any]:
    """The records in the trace event format that chrome://tracing and Perfetto read.

    One track per stage with one slice per micro-batch (`D1` is a decode step of lane 1). Between
    stages an asynchronous slice, since transfers may overlap, spans transfer and waiting, from the
    end on one stage to the start on the next; an arrow connects the two.
    """
    events: list[dict[str, Any]] = []
    if not records:
        return {"traceEvents": events, "displayTimeUnit": "ms"}
    zero = min(record.spans[0][0] for record in records)
    for stage in range(len(records[0].spans)):
        events.append(_event("M", "thread_name", stage, args={"name": f"stage {stage}"}))
        events.append(_event("M", "thread_sort_index", stage, args={"sort_index": stage}))
    for record in records:
        name = f"{record.kind}{record.lane}"
        details = {"step": record.step, "lane": record.lane, "tokens": record.num_tokens}
        for stage, (start, end) in enumerate(record.spans):
            begin, duration = (start - zero) / 1e3, (end - start) / 1e3
            events.append(_event("X", name, stage, ts=begin, dur=duration, args=details))
            if stage + 1 == len(record.spans):
                continue
            there = max(end, record.spans[stage + 1][0])  # clocks of two hosts may differ
            hop = f"{stage} -> {stage + 1}"
            key = {"cat": "transfer", "id": f"{record.step}.{stage}"}
            ends = ((end - zero) / 1e3, (there - zero) / 1e3)
            events.append(_event("b", hop, stage, ts=ends[0], args=details, **key))
            events.append(_event("e", hop, stage, ts=ends[1], **key))
            # an arrow starts inside the slice that it leaves
            events.append(_event("s", hop, stage, ts=begin, **key))
            events.append(_event("f", hop, stage + 1, ts=ends[1], bp="e", **key))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(phase: str, name: str, row: int, **more: Any) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": 0, "tid": row, **more}
