"""Times of stages: of the host on CPUs; on a GPU by events, which are stood in for here."""

import time

import pytest
import torch

from dist_int8.pipeline import wire
from dist_int8.pipeline.clock import LateSpan, StageClock, read_spans
from dist_int8.pipeline.microbatch import Kind, Limits, MicroBatch, Result

LIMITS = Limits(num_slots=4, max_tokens=64, max_rows=32, hidden_size=8, vocab_size=100)


class Event:
    """One that happened `ms` milliseconds after the first one."""

    def __init__(self, ms):
        self.ms = ms

    def elapsed_time(self, later):
        if later.ms is None:
            raise RuntimeError("the event has not happened yet")
        return later.ms - self.ms


def test_cpus_take_the_wall_clock():
    clock = StageClock(torch.device("cpu"))
    before = time.time_ns()
    start, end = clock.stop(clock.start())
    assert before <= start <= end <= time.time_ns()


def test_events_are_read_when_the_result_is_there():
    end = Event(None)
    span = LateSpan((7, 8), (Event(0.0), 10_000_000), (Event(1.5), end))
    with pytest.raises(RuntimeError, match="not happened yet"):
        read_spans([span])
    end.ms = 4.0
    assert read_spans([(1, 2), span]) == [(1, 2), (11_500_000, 14_000_000)]


def test_a_message_carries_the_times_of_the_host_and_a_result_those_of_the_gpu():
    span = LateSpan((7, 8), (Event(0.0), 1_000_000), (Event(1.0), Event(3.0)))
    micro_batch = MicroBatch(
        Kind.STEP,
        token_ids=torch.tensor([5]),
        segments=torch.tensor([[2, 10, 1]], dtype=torch.int32),
        emits=torch.tensor([1]),
        spans=[(1, 2), span],
    )
    assert wire.unpack(*wire.pack(micro_batch), LIMITS).spans == [(1, 2), (7, 8)]
    result = Result(0, 1, torch.tensor([4]), [(1, 2), span])
    got = wire.empty_result(*wire.pack_result(result), LIMITS)
    assert got.spans == [(1, 2), (2_000_000, 4_000_000)]
