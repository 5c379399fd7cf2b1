"""Runs requests through the pipeline: submits micro-batches, takes results, recovers lost ranks.

Requests join and leave while others run. Whoever wants tokens calls `step`: it submits what is
ready, takes one result and puts its tokens into the outboxes of their requests, no matter who
called. The driver's thread does all of it, so that callers in several threads share the pipeline,
and one that is interrupted leaves nothing half done. Between steps that thread sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial

from torch import Tensor

from dist_int8.engine.call import Call
from dist_int8.engine.config import EngineConfig
from dist_int8.engine.driver import Driver
from dist_int8.engine.logits_call import LogitsCall
from dist_int8.engine.requests import Request, Token
from dist_int8.engine.steps import Steps
from dist_int8.errors import RankError, ShuttingDownError
from dist_int8.pipeline.microbatch import Limits
from dist_int8.pipeline.runner import Pipeline

CLOSE_S = 10.0  # for a step that is under way when the engine is closed


class Engine(Steps):
    """Runs the requests of one pipeline. Safe to call from several threads.

    What callers call here waits for the driver's thread, which alone calls what `Steps` has.

    Args:
        pipeline: rank 0's end of it.
        limits: slots and tokens of the KV cache.
        config: how requests are scheduled.
        restore: makes a pipeline work again after a RankError, or raises it; None: a lost rank
            is final.
        begin: called in the thread of the driver before anything else.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        limits: Limits,
        config: EngineConfig,
        restore: Callable[[Pipeline, RankError], None] | None = None,
        begin: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(pipeline, limits, config, restore)
        self._driver = Driver(pipeline.world.owner, begin)

    @property
    def num_micro_batches(self) -> int:
        """Lanes: the micro-batches that are in flight when there is enough to do."""
        return self._scheduler.num_micro_batches

    def count_lanes(self, num_requests: int) -> int:
        """Counts the micro-batches that this many requests are dealt to."""
        return self._scheduler.count_lanes(num_requests)

    @property
    def failed(self) -> bool:
        """Whether something went wrong between submission and result: nothing can follow it."""
        return self.failure is not None

    @property
    def num_waiting(self) -> int:
        """Requests without a slot yet."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._scheduler.running)

    def add(self, requests: list[Request]) -> None:
        """Queues requests, all or none of them.

        Raises:
            QueueFullError: more would wait than max_queue.
            ShuttingDownError: no more are taken.
        """
        self._driver.call(partial(self._add, requests))

    def cancel(self, request: Request) -> None:
        """Ends a request; its slot is free again within one step."""
        if self._driver.is_here:
            self._driver.call(partial(self._cancel, [request]))

    def step(self) -> bool:
        """Submits what is ready and takes a result; False when there is nothing to do.

        Raises:
            RankError: a rank ended or failed; nothing more will come.
        """
        return self._driver.call(partial(self._guard, self._step))

    def check(self) -> None:
        """Checks that every rank lives, and recovers, while no call waits for a token.

        Raises:
            RankError: a rank ended or failed; nothing more will come.
        """
        self._driver.call(partial(self._guard, self._check))

    def notice_loss(self) -> None:
        """Recovers from a lost rank although no call is under way, or closes."""
        with suppress(Exception):  # it is remembered for the next call
            self.check()

    def drain(self) -> None:
        """Takes the results that are still under way."""
        self._driver.call(self._drain)

    def refuse_new(self) -> None:
        """Runs only what has a slot from now on; other callers get ShuttingDownError."""
        self._driver.call(self._refuse_new)

    def give_up(self, error: Exception) -> None:
        """Ends whatever runs or waits; its callers get the error."""
        self._driver.call(partial(self._give_up, error))

    def close(self) -> None:
        """Ends whatever runs, every stage, and the driver's thread; frees their memory.

        Safe to call twice, from any thread and from a finalizer. A call that is interrupted does
        not interrupt the end: a second one waits for it. In a fork of the process that loaded the
        model it does nothing.
        """
        if not self._driver.is_here:
            return
        self._restore = None  # nothing is recovered from now on
        self.pipeline.give_up_at(time.monotonic() + CLOSE_S)
        self._driver.finish(self._close)

    def run(self, requests: Iterable[Request], keep_going: bool = False) -> Iterator[Token]:
        """Runs the requests to their ends; yields every token as it arrives.

        They are taken bit by bit, so that other callers come in between and a long list need not
        be in memory as a whole.

        Args:
            requests: any number.
            keep_going: a request that fails by itself stays without an answer, its `error` set,
                and does not end the others.

        Raises:
            QueueFullError: not even the first may wait.
            RankError: a rank ended or failed.
            ShuttingDownError: the model is being shut down; what has a slot ends first.
            RequestError: the model's logits are NaN.
        """
        call = Call(requests, keep_going)
        try:
            while call.unfinished:
                if not self._draining:
                    call.take(self._room(call))
                self._driver.call(partial(self._advance, call))
                yield from call.hand_out()
            if call.refused:
                self._raise_failure()  # which ends the engine too
                raise ShuttingDownError("the model was shut down before every prompt was started")
        finally:  # the caller may have lost interest, or been interrupted
            self._driver.post(lambda: self._cancel(call.active))

    def logits(self, input_ids: list[list[int]]) -> Iterator[tuple[int, int, Tensor]]:
        """Yields (sequence, first position, logits fp32 [tokens, V]) of every piece, in order.

        Raises:
            RankError: a rank ended or failed.
            ShuttingDownError: the model is being shut down.
        """
        call = LogitsCall(input_ids)
        try:
            while not call.ended or call.outbox:
                if not call.outbox:
                    self._driver.call(partial(self._advance_logits, call))
                while call.outbox:
                    yield call.outbox.popleft()
        finally:
            self._driver.post(lambda: self._end_logits(call))
