"""What the thread of an engine's driver does: steps, results, recovery and the end.

No signal handler raises in that thread, so each function here runs to its end.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from dist_int8.engine.call import Call
from dist_int8.engine.config import EngineConfig
from dist_int8.engine.lanes import Turn
from dist_int8.engine.logits_call import LogitsCall, LogitsTurn
from dist_int8.engine.pieces import form_micro_batch
from dist_int8.engine.requests import Request
from dist_int8.engine.scheduler import Scheduler
from dist_int8.errors import RankError, ShuttingDownError
from dist_int8.pipeline.microbatch import Limits
from dist_int8.pipeline.runner import Pipeline

Outcome = TypeVar("Outcome")


class Steps:
    """The state of an engine, and everything that changes it. Not thread-safe: `Engine` is.

    Args:
        pipeline: rank 0's end of it.
        limits: slots and tokens of the KV cache.
        config: how requests are scheduled.
        restore: makes a pipeline work again after a RankError, or raises it; None: a lost rank
            is final.

    Attributes:
        num_steps: micro-batches submitted so far.
        failure: what went wrong in the pipeline, for good; the engine is closed then.
        closed: nothing can be run any more.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        limits: Limits,
        config: EngineConfig,
        restore: Callable[[Pipeline, RankError], None] | None,
    ) -> None:
        self.pipeline = pipeline
        self.limits = limits
        self.config = config
        self.num_steps = 0
        self.failure: BaseException | None = None
        self.closed = False
        self._scheduler = Scheduler(config, limits)
        self._in_flight: deque[Turn | LogitsTurn] = deque()
        self._logits_calls: list[LogitsCall] = []
        self._restore = restore
        self._draining = False

    def _room(self, call: Call) -> int:
        return min(self._scheduler.room, 2 * self.limits.num_slots - len(call.active))

    def _add(self, requests: list[Request]) -> None:
        if self._draining:
            raise ShuttingDownError("the model is shutting down and takes no new requests")
        self._scheduler.queue(requests)

    def _cancel(self, requests: list[Request]) -> None:
        for request in requests:
            if not request.ended:
                self._scheduler.cancel(request)

    def _advance(self, call: Call) -> None:
        """Queues more of a call's requests, and makes a step if it has nothing to hand out."""
        if self._draining:
            call.refuse_rest()
        batch = call.next_batch(self._room(call))
        if batch:
            self._add(batch)
            call.begin(batch)
        if call.waits:
            self._guard(self._step)
        call.note_ended()

    def _step(self) -> bool:
        if self.closed:
            return False
        self._scheduler.admit()
        if self._scheduler.starves:
            for call in self._logits_calls:
                self._reclaim_slots(call)
            self._scheduler.admit()
        turn = None
        if len(self._in_flight) < self._scheduler.in_flight_limit:
            turn = self._scheduler.next_turn(self.num_steps + 1)
        if turn is not None:
            self.num_steps += 1
            self.pipeline.submit(turn.micro_batch)
            self._in_flight.append(turn)
        if not self._in_flight:
            assert not self._scheduler.unfinished, "a sequence waits for another"
            return False
        self._take_result(wait=turn is None)
        return True

    def _advance_logits(self, call: LogitsCall) -> None:
        """Runs a call until it has something to hand out, or has ended."""
        self._raise_failure()
        if self.closed or (self._draining and call not in self._logits_calls):
            raise ShuttingDownError("the model was shut down before the last of the logits")
        if call not in self._logits_calls:
            self._logits_calls.append(call)
        self._guard(partial(self._run_logits, call))

    def _run_logits(self, call: LogitsCall) -> None:
        while not call.outbox and not call.ended:
            if call.has_more and not call.slots:
                self._lend_slots(call)
                continue
            while call.has_more and len(self._in_flight) < self._scheduler.in_flight_limit:
                pieces = call.next_pieces()
                self.num_steps += 1
                self.pipeline.submit(form_micro_batch(pieces, call.slots, self.num_steps))
                self._in_flight.append(call.note_submitted(pieces))
            self._take_result(wait=True)

    def _lend_slots(self, call: LogitsCall) -> None:
        """Lends a call every free slot, or makes a step towards the next one."""
        self._scheduler.admit()
        slots = self._scheduler.lend_slots()
        if slots:
            call.begin(slots, self._scheduler.choose_chunk(call.num_tokens))
        elif not self._scheduler.running:  # other calls like this one have them all
            for other in self._logits_calls:
                self._reclaim_slots(other)
        else:
            self._step()

    def _reclaim_slots(self, call: LogitsCall) -> None:
        self._scheduler.take_back(call.slots)
        call.slots = []

    def _end_logits(self, call: LogitsCall) -> None:
        """Forgets a call; what is under way of it is dropped when it comes."""
        call.closed = True
        call.outbox.clear()
        self._reclaim_slots(call)
        if call in self._logits_calls:
            self._logits_calls.remove(call)

    def _check(self) -> None:
        if not self.closed:
            self.pipeline.check()

    def _refuse_new(self) -> None:
        self._draining = True
        for request in self._scheduler.clear_queue():
            request.finish_reason = "cancelled"

    def _give_up(self, error: Exception) -> None:
        for request in self._scheduler.unfinished:
            if not request.ended:
                request.error = error
        self._scheduler.clear_queue()

    def _close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._refuse_new()
        self._give_up(ShuttingDownError("the model was shut down before the answer ended"))
        try:
            self._drain()
            self.pipeline.close()
        except RuntimeError:  # a stage is gone already; end the others all the same
            self.pipeline.kill()
        self._release()

    def _fail(self, error: BaseException) -> None:
        """Remembers what went wrong, for the callers that come after, and ends the other stages."""
        self.failure = error
        self.closed = self._draining = True
        self.pipeline.kill()
        self._release()

    def _release(self) -> None:
        self._in_flight.clear()
        self._restore = None
        self.pipeline.release()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise copy.copy(self.failure)  # several threads may wait; each has its own traceback

    def _guard(self, work: Callable[[], Outcome]) -> Outcome:
        """Does what needs the pipeline, again after a recovery; what else goes wrong is final."""
        self._raise_failure()
        try:
            while True:
                try:
                    return work()
                except RankError as error:
                    self._recover(error)
        except BaseException as error:
            self._fail(error)
            raise

    def _recover(self, error: RankError) -> None:
        """Replays every running sequence through stages that work again; else raises."""
        if self._restore is None:
            raise error
        self._restore(self.pipeline, error)
        self._in_flight.clear()
        for call in self._logits_calls:
            call.replay()
        for request in self._scheduler.running:
            if request.ended:  # cancelled while its token was computed
                self._scheduler.release(request)
            else:
                request.replay()

    def _drain(self) -> None:
        while self._in_flight:
            self._take_result(wait=True)

    def _take_result(self, wait: bool) -> None:
        result = self.pipeline.result(wait)
        if result is None:
            return
        turn = self._in_flight.popleft()
        if isinstance(turn, LogitsTurn):
            turn.take(result.values)
            return
        for request, token_id in zip(turn.emitting, result.values.tolist(), strict=True):
            request.num_pending -= 1
            if not request.ended:
                request.take(token_id, self.config.eos_token_ids, self.limits.max_tokens)
            if request.ended:
                self._scheduler.release(request)
