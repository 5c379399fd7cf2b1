"""Results leave in their order once they are ready, while the stage goes on."""

import threading

import pytest
import torch

from dist_int8.errors import RankError
from dist_int8.pipeline.microbatch import Result
from dist_int8.pipeline.result_sender import ResultSender


class Event:
    """As torch.cuda.Event, set by the test."""

    def __init__(self):
        self.set = threading.Event()

    def query(self):
        return self.set.is_set()

    def synchronize(self):
        assert self.set.wait(60)


def no_failure():
    raise AssertionError("nothing fails here")


def late_result(step):
    return Result(0, step, torch.tensor([step]), ready=Event())


def test_the_stage_goes_on_and_results_leave_in_order():
    sent = []
    sender = ResultSender(lambda result: sent.append(result.step), no_failure)
    results = [late_result(step) for step in range(2)]
    for result in results:
        sender.put(result)  # neither is ready: nobody waits here
    assert sent == []
    results[1].ready.set.set()  # the first is not ready yet, so that nothing leaves
    results[0].ready.set.set()
    sender.finish()
    assert sent == [0, 1]


def test_a_fast_stage_is_held_back():
    sender = ResultSender(lambda result: None, no_failure, size=1)
    first = late_result(0)
    sender.put(first)
    done = threading.Event()

    def put_more():
        for step in (1, 2):
            sender.put(late_result(step))
        done.set()

    thread = threading.Thread(target=put_more, daemon=True)
    thread.start()
    assert not done.wait(0.2)  # one waits for its tokens, one in the queue: there is no more room
    first.ready.set.set()
    assert done.wait(60)


def test_a_failure_is_told_at_once_and_raised_where_the_stage_looks_next():
    """The stage may wait for a micro-batch that does not come without this result."""
    told = threading.Event()

    def lose(result):
        raise RankError("lost the connection to rank 0", 0)

    sender = ResultSender(lose, told.set)
    result = late_result(0)
    result.ready.set.set()
    sender.put(result)
    assert told.wait(60)
    for look in (sender.raise_failure, lambda: sender.put(late_result(1)), sender.finish):
        with pytest.raises(RankError, match="rank 0"):
            look()


def test_closing_ends_the_thread_and_never_waits():
    sender = ResultSender(lambda result: None, no_failure)
    late = late_result(0)
    sender.put(late)
    sender.close()
    late.ready.set.set()
    sender._thread.join(60)
    assert not sender._thread.is_alive()
    sender.finish()  # nothing is left to wait for
