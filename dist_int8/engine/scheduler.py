"""Decides what runs next: a queue, admission to KV slots, lanes, and the size of prompt chunks.

It knows nothing of the pipeline: `Engine` asks for the next turn, submits it, and reports which
requests ended.
"""

from __future__ import annotations

from collections import deque

from dist_int8.engine.config import EngineConfig
from dist_int8.engine.lanes import Lanes, Turn
from dist_int8.engine.requests import Request
from dist_int8.errors import QueueFullError
from dist_int8.pipeline import schedule
from dist_int8.pipeline.microbatch import Limits


class Scheduler:
    """Schedules one engine's requests. Not thread-safe: the engine has the lock.

    Args:
        config: how requests are scheduled.
        limits: slots and tokens of the KV cache.
    """

    def __init__(self, config: EngineConfig, limits: Limits) -> None:
        self.config = config
        self.num_micro_batches = min(config.num_micro_batches, limits.num_slots)
        # with one micro-batch only one is in flight; otherwise chunks of a single prompt stream
        # through the stages as well
        self.in_flight_limit = (
            schedule.in_flight_limit(config.num_stages, self.num_micro_batches)
            if config.num_micro_batches > 1
            else 1
        )
        ahead = 1 if config.runs_ahead else 0
        self.in_flight_limit += ahead
        self._waiting: deque[Request] = deque()
        self._lanes = Lanes(self.num_micro_batches, limits, ahead)
        self._chunk = config.prefill_chunk
        self._num_lent = 0

    def count_lanes(self, num_requests: int) -> int:
        """Counts the micro-batches that this many requests are dealt to."""
        return max(1, min(self.num_micro_batches, num_requests))

    @property
    def num_waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> list[Request]:
        """Requests that hold a slot."""
        return self._lanes.running

    @property
    def answering(self) -> bool:
        """Whether a running request has its prompt prefilled and waits for tokens."""
        return self._lanes.answering

    @property
    def unfinished(self) -> list[Request]:
        """Requests that run, then those that wait."""
        return [*self._lanes.running, *self._waiting]

    @property
    def free_slots(self) -> list[int]:
        """KV slots that no request holds, in the order in which they are given."""
        return list(self._lanes.free_slots)

    @property
    def room(self) -> int:
        """How many more requests may be queued."""
        return self._num_open + self.config.max_queue - len(self._waiting)

    @property
    def starves(self) -> bool:
        """Whether a request waits, and no other will free a slot for it."""
        return bool(self._waiting) and not self._lanes.free_slots and not self._lanes.running

    @property
    def _num_open(self) -> int:
        """Slots that no request holds; those that are lent come back when they are needed."""
        return len(self._lanes.free_slots) + self._num_lent

    def lend_slots(self) -> list[int]:
        """Takes the free slots away from requests, for sequences whose logits are asked for."""
        slots = list(self._lanes.free_slots)
        self._lanes.free_slots.clear()
        self._num_lent += len(slots)
        return slots

    def take_back(self, slots: list[int]) -> None:
        """Gives slots that were lent to requests again.

        What is under way may still write to them: stages run micro-batches in order.
        """
        self._num_lent -= len(slots)
        self._lanes.free_slots.extend(slots)

    def queue(self, requests: list[Request]) -> None:
        """Queues requests, all or none of them, and admits those that find a slot.

        Raises:
            QueueFullError: more would wait than max_queue.
        """
        if len(requests) > self.room:
            num_waiting = len(self._waiting) + len(requests) - self._num_open
            raise QueueFullError(
                f"engine: at most {self.config.max_queue} requests may wait for a slot, got "
                f"{num_waiting}; try again later, or raise max_queue or max_sequences"
            )
        self._waiting.extend(requests)
        self.admit()
        self._chunk = self.choose_chunk(sum(request.num_prompt_left for request in self.unfinished))

    def admit(self) -> None:
        """Gives free slots to the requests that have waited longest."""
        while self._waiting and self._lanes.free_slots:
            self._lanes.admit(self._waiting.popleft())

    def release(self, request: Request) -> None:
        """Frees the slot of a request that ended."""
        self._lanes.release(request)

    def cancel(self, request: Request) -> None:
        """Ends a request. Its slot is freed now, or with the token that is being computed."""
        request.finish_reason = "cancelled"
        if request in self._waiting:
            self._waiting.remove(request)
        elif not request.num_pending:
            self._lanes.release(request)

    def clear_queue(self) -> list[Request]:
        """Empties the queue; returns the requests that waited in it."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting

    def next_turn(self, step: int) -> Turn | None:
        """Forms the micro-batch number `step`; None while every lane waits for a token."""
        return self._lanes.next(self._budget(), step)

    def choose_chunk(self, num_prompt_tokens: int) -> int:
        """Chooses the prompt tokens per micro-batch when this many are to be prefilled in all."""
        config = self.config
        return schedule.prefill_chunk(
            num_prompt_tokens, config.num_stages, config.smallest_chunk, config.prefill_chunk
        )

    def _budget(self) -> int:
        """Computes the maximum number of prompt tokens in the next micro-batch.

        While requests are being answered they wait for the micro-batches of prompts in between.
        These are then no longer than a chunk must be to cost little more than its share.
        """
        return min(self._chunk, self.config.smallest_chunk) if self.answering else self._chunk
