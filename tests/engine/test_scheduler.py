"""Queue, slots and turns, without a pipeline."""

import dataclasses

import pytest

from dist_int8.config import GenerationSettings
from dist_int8.engine import EngineConfig
from dist_int8.engine.requests import Request
from dist_int8.engine.scheduler import Scheduler
from dist_int8.engine.text import TextStream
from dist_int8.errors import QueueFullError
from dist_int8.pipeline.microbatch import Limits

CONFIG = EngineConfig(
    num_stages=2, num_micro_batches=2, prefill_chunk=16, smallest_chunk=4, max_queue=2
)


def limits(num_slots: int) -> Limits:
    return Limits(num_slots, max_tokens=64, max_rows=64, hidden_size=8, vocab_size=50)


def make_requests(count: int, num_prompt_tokens: int = 3) -> list[Request]:
    settings = GenerationSettings(max_new_tokens=4)
    return [
        Request(index, [1] * num_prompt_tokens, settings, seed=0, text=TextStream(None))
        for index in range(count)
    ]


def finish_turn(turn) -> None:
    """What the engine does with a result."""
    for request in turn.emitting:
        request.num_pending -= 1
        request.take(5, frozenset(), max_tokens=64)


def test_requests_take_slots_in_order_and_the_rest_waits():
    scheduler = Scheduler(CONFIG, limits(2))
    requests = make_requests(3)
    scheduler.queue(requests)
    assert (len(scheduler.running), scheduler.num_waiting) == (2, 1)
    assert [request.slot for request in requests] == [0, 1, -1]
    assert scheduler.free_slots == [] and scheduler.room == 1
    scheduler.release(requests[0])
    scheduler.admit()
    assert requests[2].slot == 0 and scheduler.num_waiting == 0


def test_a_full_queue_takes_none_of_the_requests():
    scheduler = Scheduler(CONFIG, limits(2))
    with pytest.raises(QueueFullError, match="at most 2 requests may wait for a slot, got 3"):
        scheduler.queue(make_requests(5))
    assert scheduler.unfinished == []


def test_cancelling_frees_the_slot_unless_a_token_is_being_computed():
    scheduler = Scheduler(CONFIG, limits(1))
    running, waiting = make_requests(2)
    scheduler.queue([running, waiting])
    scheduler.cancel(waiting)
    assert scheduler.num_waiting == 0
    turn = scheduler.next_turn(1)
    scheduler.cancel(running)
    assert running.finish_reason == "cancelled" and scheduler.running == [running]
    finish_turn(turn)
    scheduler.release(running)
    assert scheduler.running == [] and scheduler.free_slots == [0]


def test_no_turn_while_every_lane_waits_for_a_token():
    scheduler = Scheduler(CONFIG, limits(4))
    scheduler.queue(make_requests(2))
    turns = [scheduler.next_turn(1), scheduler.next_turn(2)]
    assert [turn.lane.index for turn in turns] == [0, 1]
    assert scheduler.next_turn(3) is None
    finish_turn(turns[1])
    assert scheduler.next_turn(3).lane.index == 1


def test_prompt_chunks_are_small_while_a_request_is_answered():
    scheduler = Scheduler(CONFIG, limits(4))
    first, second = make_requests(1) + make_requests(1, num_prompt_tokens=64)
    scheduler.queue([first])
    finish_turn(scheduler.next_turn(1))
    assert scheduler.answering
    scheduler.queue([second])
    sizes = [scheduler.next_turn(step).micro_batch.num_tokens for step in range(2, 5)]
    assert max(sizes) == CONFIG.smallest_chunk
    scheduler.release(first)
    assert scheduler.next_turn(5).micro_batch.num_tokens > CONFIG.smallest_chunk


def test_one_micro_batch_means_one_in_flight():
    alone = dataclasses.replace(CONFIG, num_micro_batches=1)
    assert Scheduler(alone, limits(4)).in_flight_limit == 1
    assert Scheduler(CONFIG, limits(1)).in_flight_limit > 1


def test_lanes_are_counted_up_to_slots_and_requests():
    scheduler = Scheduler(dataclasses.replace(CONFIG, num_micro_batches=6), limits(4))
    assert [scheduler.count_lanes(n) for n in (0, 1, 3, 9)] == [1, 1, 3, 4]


def test_clearing_the_queue_returns_the_waiting_requests():
    scheduler = Scheduler(CONFIG, limits(1))
    requests = make_requests(3)
    scheduler.queue(requests)
    assert scheduler.clear_queue() == requests[1:] and scheduler.running == requests[:1]
