"""Runs requests through the pipeline: submits micro-batches, takes results, recovers lost ranks.

Requests join and leave while others run. Whoever wants tokens calls `step`: it submits what is
ready, takes one result and puts its tokens into the outboxes of their requests, no matter who
called. So callers in several threads drive the same pipeline, which needs no thread of its own.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from dist_int8.engine.call import Call
from dist_int8.engine.config import EngineConfig
from dist_int8.engine.lanes import Turn
from dist_int8.engine.pieces import SequencePiece, form_micro_batch, pack
from dist_int8.engine.requests import Request, Token
from dist_int8.engine.scheduler import Scheduler
from dist_int8.errors import RankError, ShuttingDownError
from dist_int8.pipeline.microbatch import Limits, Result
from dist_int8.pipeline.runner import Pipeline


class Engine:
    """Runs the requests of one pipeline. Safe to call from several threads.

    Args:
        pipeline: rank 0's end of it.
        limits: slots and tokens of the KV cache.
        config: how requests are scheduled.
        restore: makes a pipeline work again after a RankError, or raises it; None: a lost rank
            is final.

    Attributes:
        num_steps: micro-batches submitted so far.
        failure: what went wrong in the pipeline, for good.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        limits: Limits,
        config: EngineConfig,
        restore: Callable[[Pipeline, RankError], None] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.limits = limits
        self.config = config
        self.num_steps = 0
        self.failure: BaseException | None = None
        self._lock = threading.RLock()
        self._scheduler = Scheduler(config, limits.num_slots)
        self._in_flight: deque[Turn] = deque()
        self._restore = restore
        self._draining = False
        self._stopped = False

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
        with self._lock:
            if self._draining:
                raise ShuttingDownError("the model is shutting down and takes no new requests")
            self._scheduler.queue(requests)

    def cancel(self, request: Request) -> None:
        """Ends a request; its slot is free again within one step."""
        if not self.pipeline.world.owner.is_here:  # in a forked child the lock may never be free
            return
        with self._lock:
            if not request.ended:
                self._scheduler.cancel(request)

    def step(self) -> bool:
        """Submits what is ready and takes a result; False when there is nothing to do.

        Raises:
            RankError: a rank ended or failed; nothing more will come.
        """
        with self._lock, self._guarded():
            try:
                return self._step()
            except RankError as error:
                self._recover(error)
                return True

    def _step(self) -> bool:
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

    def check(self) -> None:
        """Checks that every rank lives, and recovers, while no call waits for a token.

        Raises:
            RankError: a rank ended or failed; nothing more will come.
        """
        with self._lock, self._guarded():
            if self._stopped:
                return
            try:
                self.pipeline.check()
            except RankError as error:
                self._recover(error)

    def refuse_new(self) -> None:
        """Runs only what has a slot from now on; other callers get ShuttingDownError."""
        with self._lock:
            self._draining = True
            for request in self._scheduler.clear_queue():
                request.finish_reason = "cancelled"

    def give_up(self, error: Exception) -> None:
        """Ends whatever runs or waits; its callers get the error."""
        with self._lock:
            for request in self._scheduler.unfinished:
                if not request.ended:
                    request.error = error
            self._scheduler.clear_queue()

    def stop(self) -> None:
        """Ends whatever runs or waits, for a shutdown; nothing is recovered from now on."""
        with self._lock:
            self._stopped = True
            self._restore = None
            self.refuse_new()
            self.give_up(ShuttingDownError("the model was shut down before the answer ended"))

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
                with self._lock:
                    self._advance(call)
                yield from call.hand_out()
            if call.refused:
                raise ShuttingDownError("the model was shut down before every prompt was started")
        finally:  # the caller may have lost interest
            for request in call.active:
                self.cancel(request)

    def _advance(self, call: Call) -> None:
        """Queues more of a call's requests, and makes a step if it has nothing to hand out."""
        if self._draining:
            call.refuse_rest()
        room = min(self._scheduler.room, 2 * self.limits.num_slots - len(call.active))
        batch = call.take(room)
        if batch:
            self.add(batch)
            call.begin(batch)
        if call.waits:
            self.step()
        call.note_ended()

    def logits(self, input_ids: list[list[int]]) -> Iterator[tuple[int, int, Tensor]]:
        """Yields (sequence, first position, logits fp32 [tokens, V]) of every piece.

        After a recovery all of them come again.

        Raises:
            RankError: a rank ended or failed.
        """
        with self._lock, self._guarded():
            while True:
                try:
                    yield from self._logits(input_ids)
                    return
                except RankError as error:
                    self._recover(error)

    def _logits(self, input_ids: list[list[int]]) -> Iterator[tuple[int, int, Tensor]]:
        self.drain()
        while not self._scheduler.free_slots:
            self._step()
            self.drain()
        slots = self._scheduler.free_slots
        size = self._scheduler.choose_chunk(sum(map(len, input_ids)))
        under_way: deque[list[SequencePiece]] = deque()
        try:
            for pieces in pack(input_ids, size, len(slots)):
                if len(under_way) >= self._scheduler.in_flight_limit:
                    yield from self._take_logits(under_way.popleft())
                self.num_steps += 1
                self.pipeline.submit(form_micro_batch(pieces, slots, self.num_steps))
                under_way.append(pieces)
            while under_way:
                yield from self._take_logits(under_way.popleft())
        except GeneratorExit:  # the caller has seen enough; the next one finds an empty pipeline
            for _ in under_way:
                self._wait_for_result()
            raise

    def _take_logits(self, pieces: list[SequencePiece]) -> Iterator[tuple[int, int, Tensor]]:
        result = self._wait_for_result()
        values = result.values.split([len(piece.token_ids) for piece in pieces])
        for piece, logits in zip(pieces, values, strict=True):
            yield piece.sequence, piece.start, logits

    def drain(self) -> None:
        """Takes the results that are still under way."""
        with self._lock:
            while self._in_flight:
                self._take_result(wait=True)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Remembers what went wrong, for the callers that come after."""
        if self.failure is not None:
            raise copy.copy(self.failure)  # several threads may wait; each has its own traceback
        try:
            yield
        except GeneratorExit:  # the caller of `logits` has seen enough
            raise
        except BaseException as error:
            self.failure = error
            raise

    def _recover(self, error: RankError) -> None:
        """Replays every running sequence through stages that work again; else raises."""
        if self._restore is None:
            raise error
        self._restore(self.pipeline, error)
        self._in_flight.clear()
        for request in self._scheduler.running:
            if request.ended:  # cancelled while its token was computed
                self._scheduler.release(request)
            else:
                request.replay()

    def _wait_for_result(self) -> Result:
        result = self.pipeline.result()
        assert result is not None
        return result

    def _take_result(self, wait: bool) -> None:
        result = self.pipeline.result(wait)
        if result is None:
            return
        turn = self._in_flight.popleft()
        for request, token_id in zip(turn.emitting, result.values.tolist(), strict=True):
            request.pending = False
            if request.finish_reason != "cancelled":
                request.take(token_id, self.config.eos_token_ids, self.limits.max_tokens)
            if request.ended:
                self._scheduler.release(request)
