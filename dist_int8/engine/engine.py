"""Runs requests through the pipeline: a queue, admission to KV slots, tokens handed out.

Requests join and leave while others run. Whoever wants tokens calls `step`: it submits what is
ready, takes one result and puts its tokens into the outboxes of their requests, whoever asked. So
callers in several threads drive the same pipeline without a thread of its own.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

from dist_int8.engine.lanes import Lanes, Turn
from dist_int8.engine.requests import Request, Token
from dist_int8.errors import QueueFullError, RankError, ShuttingDownError
from dist_int8.pipeline import schedule
from dist_int8.pipeline.microbatch import Kind, Limits, MicroBatch, Result
from dist_int8.pipeline.runner import Pipeline

_Piece = tuple[int, int, list[int]]  # sequence, first position, token ids


def _packed(sequences: list[list[int]], size: int, num_slots: int) -> Iterator[list[_Piece]]:
    """The sequences in order, cut and put together to at most `size` tokens of `num_slots` each."""
    pieces: list[_Piece] = []
    room = size
    for index, token_ids in enumerate(sequences):
        start = 0
        while start < len(token_ids):
            if not room or len(pieces) == num_slots:
                yield pieces
                pieces, room = [], size
            piece = token_ids[start : start + room]
            pieces.append((index, start, piece))
            start, room = start + len(piece), room - len(piece)
    if pieces:
        yield pieces


class Engine:
    """One pipeline's requests.

    Args:
        pipeline: rank 0's end of it.
        limits: slots and tokens of the KV cache.
        num_stages: stages of the pipeline.
        num_micro_batches: lanes at most.
        prefill_chunk: prompt tokens of one micro-batch at most.
        smallest_chunk: prompt tokens below which cutting costs more than an idle stage.
        eos_token_ids: tokens that end an answer.
        max_queue: requests that may wait for a slot.
        restore: makes a pipeline work again after a RankError, or raises it; None: nobody can.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        limits: Limits,
        *,
        num_stages: int,
        num_micro_batches: int,
        prefill_chunk: int,
        smallest_chunk: int,
        eos_token_ids: frozenset[int],
        max_queue: int,
        restore: Callable[[Pipeline, RankError], None] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.limits = limits
        self.num_stages = num_stages
        self.num_micro_batches = min(num_micro_batches, limits.num_slots)
        self.prefill_chunk = prefill_chunk
        self.smallest_chunk = smallest_chunk
        self.eos_token_ids = eos_token_ids
        self.max_queue = max_queue
        self.num_steps = 0  # micro-batches submitted so far
        self._lock = threading.RLock()
        self._waiting: deque[Request] = deque()
        self._lanes = Lanes(self.num_micro_batches, limits.num_slots)
        self._in_flight: deque[Turn] = deque()
        # one micro-batch is what it says; otherwise chunks of one prompt stream through the stages
        self._limit = (
            schedule.in_flight_limit(num_stages, self.num_micro_batches)
            if num_micro_batches > 1
            else 1
        )
        self._chunk = prefill_chunk
        self.failure: BaseException | None = None  # what went wrong in the pipeline, for good
        self._restore = restore
        self._draining = False
        self._stopped = False

    def num_lanes(self, num_requests: int) -> int:
        """Micro-batches that so many requests are dealt to."""
        return max(1, min(self.num_micro_batches, num_requests))

    @property
    def failed(self) -> bool:
        """Something went wrong between submission and result: nothing can follow it."""
        return self.failure is not None

    @property
    def num_waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._lanes.running)

    def add(self, requests: list[Request]) -> None:
        """Queues requests, all or none of them.

        Raises:
            QueueFullError: more would wait than max_queue.
            ShuttingDownError: no more are taken.
        """
        with self._lock:
            if self._draining:
                raise ShuttingDownError(
                    "generate: the model must take requests, got one shutting down"
                )
            room = len(self._lanes.free_slots) + self.max_queue
            if len(self._waiting) + len(requests) > room:
                raise QueueFullError(
                    f"engine: at most {self.max_queue} requests may wait for a slot, got "
                    f"{len(self._waiting) + len(requests) - len(self._lanes.free_slots)}; try "
                    "again later, or raise max_queue or max_sequences"
                )
            self._waiting.extend(requests)
            self._admit()
            unfinished = [*self._lanes.running, *self._waiting]
            self._chunk = self._chunk_for(sum(request.num_prompt_left for request in unfinished))

    def cancel(self, request: Request) -> None:
        """Ends a request; its slot is free again within one step."""
        with self._lock:
            if request.ended:
                return
            request.finish_reason = "cancelled"
            if request in self._waiting:
                self._waiting.remove(request)
            elif not request.pending:
                self._lanes.release(request)

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
        self._admit()
        turn = None
        if len(self._in_flight) < self._limit:
            turn = self._lanes.next(self._budget(), self.num_steps + 1)
        if turn is not None:
            self.num_steps += 1
            self.pipeline.submit(turn.micro_batch)
            self._in_flight.append(turn)
        if not self._in_flight:
            assert not self._waiting and not self.num_running, "a sequence waits for another"
            return False
        self._take_result(wait=turn is None)
        return True

    def check(self) -> None:
        """Looks whether every rank lives, and recovers; for when nobody waits for a token.

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
        """From now on only what has a slot runs; the others' callers get ShuttingDownError."""
        with self._lock:
            self._draining = True
            for request in self._waiting:
                request.finish_reason = "cancelled"
            self._waiting.clear()

    def give_up(self, error: Exception) -> None:
        """Ends whatever runs or waits; its callers get the error."""
        with self._lock:
            for request in [*self._lanes.running, *self._waiting]:
                if not request.ended:
                    request.error = error
            self._waiting.clear()

    def stop(self) -> None:
        """Ends whatever runs or waits, for a shutdown; nothing is recovered from now on."""
        with self._lock:
            self._stopped = True
            self._restore = None
            self.refuse_new()
            self.give_up(
                ShuttingDownError("generate: the model was shut down before the answer's end")
            )

    def run(self, requests: Iterable[Request], keep_going: bool = False) -> Iterator[Token]:
        """Runs the requests to their ends; yields every token as it arrives.

        They are taken bit by bit, so that other callers come in between and a long list need not
        be there as a whole.

        Args:
            requests: any number.
            keep_going: a request that fails by itself stays without an answer, its `error` set,
                and does not end the others.

        Raises:
            QueueFullError: not even the first may wait.
            RankError: a rank ended or failed.
            ShuttingDownError: the model is being shut down; what has a slot ends first.
            RuntimeError: the model's logits are NaN.
        """
        left = iter(requests)
        active: list[Request] = []
        more, queued, refused = True, False, False
        try:
            while more or active:
                with self._lock:
                    if self._draining:
                        refused |= more
                        more = False
                    room = len(self._lanes.free_slots) + self.max_queue - self.num_waiting
                    room = min(room, 2 * self.limits.num_slots - len(active))
                    count = max(room, 0 if queued else 1) if more else 0
                    batch = list(islice(left, count))
                    more = len(batch) == count if count else more
                    if batch:
                        self.add(batch)
                        active += batch
                        queued = True
                    if active and not any(request.outbox or request.ended for request in active):
                        self.step()
                for request in active:
                    while request.outbox:
                        yield request.outbox.popleft()
                    if isinstance(request.error, ShuttingDownError) or (
                        request.error and not keep_going
                    ):
                        raise request.error
                    refused |= request.finish_reason == "cancelled"  # nobody else cancels it
                active = [request for request in active if not request.ended]
            if refused:
                raise ShuttingDownError(
                    "generate: the model was shut down before every prompt was begun"
                )
        finally:  # the caller may have lost interest
            for request in active:
                self.cancel(request)

    def logits(self, input_ids: list[list[int]]) -> Iterator[tuple[int, int, Tensor]]:
        """(sequence, first position, logits fp32 [tokens, V]) of every chunk of every sequence.

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
        while not self._lanes.free_slots:
            self._step()
            self.drain()
        slots = list(self._lanes.free_slots)
        size = self._chunk_for(sum(map(len, input_ids)))
        under_way: deque[list[_Piece]] = deque()
        try:
            for pieces in _packed(input_ids, size, len(slots)):
                if len(under_way) >= self._limit:
                    yield from self._logits_result(under_way.popleft())
                self.num_steps += 1
                rows = [
                    (slots[index % len(slots)], start, len(ids)) for index, start, ids in pieces
                ]
                self.pipeline.submit(
                    MicroBatch(
                        Kind.LOGITS,
                        step=self.num_steps,
                        token_ids=torch.tensor([token for _, _, ids in pieces for token in ids]),
                        segments=torch.tensor(rows, dtype=torch.int32),
                        emits=torch.zeros(len(rows), dtype=torch.int64),
                    )
                )
                under_way.append(pieces)
            while under_way:
                yield from self._logits_result(under_way.popleft())
        except GeneratorExit:  # the caller has seen enough; the next one finds an empty pipeline
            for _ in under_way:
                self._result()
            raise

    def _logits_result(self, pieces: list[_Piece]) -> Iterator[tuple[int, int, Tensor]]:
        values = self._result().values.split([len(token_ids) for _, _, token_ids in pieces])
        for (index, start, _), logits in zip(pieces, values, strict=True):
            yield index, start, logits

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
        for request in self._lanes.running:
            if request.ended:  # cancelled while its token was computed
                self._lanes.release(request)
            else:
                request.replay()

    def _result(self) -> Result:
        result = self.pipeline.result()
        assert result is not None
        return result

    def _chunk_for(self, num_prompt_tokens: int) -> int:
        return schedule.prefill_chunk(
            num_prompt_tokens, self.num_stages, self.smallest_chunk, self.prefill_chunk
        )

    def _budget(self) -> int:
        """Prompt tokens of the next micro-batch at most.

        Who is answering waits for the micro-batches of prompts in between, so these are then no
        longer than a chunk must be to cost little more than its share.
        """
        return min(self._chunk, self.smallest_chunk) if self._lanes.answering else self._chunk

    def _admit(self) -> None:
        while self._waiting and self._lanes.free_slots:
            self._lanes.admit(self._waiting.popleft())

    def _take_result(self, wait: bool) -> None:
        result = self.pipeline.result(wait)
        if result is None:
            return
        turn = self._in_flight.popleft()
        for request, token_id in zip(turn.emitting, result.values.tolist(), strict=True):
            request.pending = False
            if request.finish_reason != "cancelled":
                request.take(token_id, self.eos_token_ids, self.limits.max_tokens)
            if request.ended:
                self._lanes.release(request)
