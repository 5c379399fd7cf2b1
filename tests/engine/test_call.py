"""One call of `Engine.run`: requests taken bit by bit, every token handed out once."""

import pytest

from dist_int8.config import GenerationSettings
from dist_int8.engine.call import Call
from dist_int8.engine.requests import Request
from dist_int8.engine.text import TextStream
from dist_int8.errors import RequestError, ShuttingDownError


def make_request(index: int, max_new_tokens: int = 2) -> Request:
    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    return Request(index, [1, 2], settings, seed=0, text=TextStream(None))


def give_token(request: Request, token_id: int) -> None:
    request.take(token_id, frozenset(), max_tokens=64)


def begin(count: int, keep_going: bool = False) -> Call:
    """A call whose requests are all taken."""
    call = Call((make_request(index) for index in range(count)), keep_going)
    call.take(count)
    call.begin(call.next_batch(count))
    return call


def test_requests_are_taken_as_there_is_room():
    call = Call((make_request(index) for index in range(5)), keep_going=False)

    def take(room: int) -> list[int]:
        call.take(room)
        batch = call.next_batch(room)
        call.begin(batch)
        return [request.index for request in batch]

    assert take(2) == [0, 1]
    assert take(0) == [] and call.unfinished
    assert take(9) == [2, 3, 4]
    assert take(9) == [] and call.unfinished
    call.active.clear()
    assert not call.unfinished


def test_requests_that_no_longer_find_room_wait_in_the_call():
    """Another call came in between their making and their queueing."""
    call = Call((make_request(index) for index in range(4)), keep_going=False)
    call.take(3)
    call.begin(call.next_batch(1))
    assert [request.index for request in call.active] == [0] and call.waits
    assert call.next_batch(0) == [] and call.unfinished
    call.take(2)  # has made them already
    call.begin(call.next_batch(2))
    call.take(2)
    assert [request.index for request in call.active + call.taken] == [0, 1, 2, 3]


def test_the_first_request_is_taken_even_from_a_full_queue():
    call = Call((make_request(index) for index in range(2)), keep_going=False)
    call.take(-3)
    assert len(call.next_batch(-3)) == 1


def test_a_call_waits_only_while_it_has_nothing_to_hand_out():
    call = begin(2)
    assert call.waits
    give_token(call.active[1], 7)
    assert not call.waits
    call.note_ended()
    assert [token.token_id for token in call.hand_out()] == [7]
    assert call.waits


def test_a_request_that_ends_while_tokens_are_handed_out_keeps_its_last_token():
    call = begin(2)
    first, second = call.active
    give_token(first, 3)
    give_token(second, 4)
    call.note_ended()
    tokens = call.hand_out()
    assert next(tokens).token_id == 3 and next(tokens).token_id == 4
    give_token(first, 5)  # another call made the step that ends it
    assert list(tokens) == [] and not call.waits
    call.note_ended()
    assert [token.token_id for token in call.hand_out()] == [5]
    assert call.active == [second]


def test_an_error_ends_the_call_unless_it_keeps_going():
    for keep_going in (False, True):
        call = begin(1, keep_going)
        call.active[0].error = RequestError("NaN")
        call.note_ended()
        if keep_going:
            assert list(call.hand_out()) == [] and not call.active
        else:
            with pytest.raises(RequestError):
                list(call.hand_out())


def test_a_shutdown_ends_every_call():
    call = begin(1, keep_going=True)
    call.active[0].error = ShuttingDownError("the model was shut down")
    call.note_ended()
    with pytest.raises(ShuttingDownError):
        list(call.hand_out())


def test_requests_that_a_shutdown_refuses_are_reported():
    call = Call(iter([make_request(0)]), keep_going=False)
    call.take(1)  # made, and not queued
    call.refuse_rest()
    assert call.refused and not call.unfinished
    call = begin(1)
    call.refuse_rest()  # it has more only until an empty take says otherwise
    call.active[0].finish_reason = "cancelled"
    call.note_ended()
    assert list(call.hand_out()) == [] and call.refused
