"""Runs requests through the pipeline: admits them to slots, forms micro-batches, hands out tokens.

Sequences are dealt to lanes, one micro-batch each, as evenly as can be. A lane's micro-batch has
one token of every sequence that decodes and a chunk of the prompts that do not yet; a sequence that
ends leaves its slot to the next one waiting.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_int8.engine.requests import Request, Token
from dist_int8.engine.sampling import NOT_A_TOKEN
from dist_int8.pipeline import schedule
from dist_int8.pipeline.microbatch import SAMPLING_FIELDS, Kind, Limits, MicroBatch, Result
from dist_int8.pipeline.runner import Pipeline


@dataclass
class _Lane:
    index: int
    requests: list[Request] = field(default_factory=list)


@dataclass
class Speed:
    """Seconds and tokens of one run."""

    started: float = 0.0
    prefilled: float = 0.0
    ended: float = 0.0
    num_prompt_tokens: int = 0
    num_early_tokens: int = 0  # sampled until every prompt had its first token
    num_tokens: int = 0

    @property
    def prefill_tokens_per_s(self) -> float:
        return _rate(self.num_prompt_tokens, self.prefilled - self.started)

    @property
    def decode_tokens_per_s(self) -> float:
        return _rate(self.num_tokens - self.num_early_tokens, self.ended - self.prefilled)


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
    ) -> None:
        self.pipeline = pipeline
        self.limits = limits
        self.num_stages = num_stages
        self.num_micro_batches = num_micro_batches
        self.prefill_chunk = prefill_chunk
        self.smallest_chunk = smallest_chunk
        self.eos_token_ids = eos_token_ids
        self.speed = Speed()
        self._step = 0

    def num_lanes(self, num_requests: int) -> int:
        """Micro-batches that so many requests are dealt to."""
        return max(1, min(self.num_micro_batches, num_requests, self.limits.num_slots))

    def run(self, requests: list[Request]) -> Iterator[Token]:
        """Runs the requests to their ends; yields every token as it arrives.

        Raises:
            RankDied: a rank ended or failed.
            RuntimeError: the model's logits are NaN.
        """
        waiting = deque(requests)
        lanes = deque(_Lane(i) for i in range(self.num_lanes(len(requests))))
        free_slots = deque(range(self.limits.num_slots))
        in_flight: deque[tuple[_Lane, list[Request]]] = deque()
        limit = schedule.in_flight_limit(self.num_stages, len(lanes))
        num_without_token = len(requests)
        num_prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        chunk = self._chunk(num_prompt_tokens)
        self.speed = Speed(started=time.perf_counter(), num_prompt_tokens=num_prompt_tokens)
        self.pipeline.trace.clear()
        try:
            while waiting or in_flight or any(lane.requests for lane in lanes):
                self._admit(waiting, free_slots, lanes)
                formed = self._next(lanes, chunk) if len(in_flight) < limit else None
                if formed is not None:
                    lane, micro_batch, emitting = formed
                    self.pipeline.submit(micro_batch)
                    in_flight.append((lane, emitting))
                assert in_flight, "every sequence waits for another"
                result = self.pipeline.result(wait=formed is None)
                if result is None:
                    continue
                lane, emitting = in_flight.popleft()
                for request, token_id in zip(emitting, result.values.tolist(), strict=True):
                    num_without_token -= not request.token_ids
                    token = self._take(request, token_id)
                    self._count(num_without_token)
                    if token.finish_reason is not None:
                        lane.requests.remove(request)
                        free_slots.append(request.slot)
                    yield token
            self.speed.ended = time.perf_counter()
        except GeneratorExit:  # the caller lost interest: leave nothing in flight behind
            while self.pipeline.in_flight:
                self.pipeline.result()
            raise

    def logits(self, input_ids: list[list[int]]) -> Iterator[tuple[int, int, Tensor]]:
        """(sequence, first position, logits fp32 [tokens, V]) of every chunk of every sequence."""
        limit = schedule.in_flight_limit(self.num_stages, self.num_micro_batches)
        in_flight: deque[tuple[int, int]] = deque()
        size = self._chunk(sum(map(len, input_ids)))
        for index, token_ids in enumerate(input_ids):
            slot = index % self.limits.num_slots
            for start in range(0, len(token_ids), size):
                chunk = token_ids[start : start + size]
                if len(in_flight) >= limit:
                    yield (*in_flight.popleft(), self._result().values)
                self.pipeline.submit(
                    MicroBatch(
                        Kind.LOGITS,
                        step=self._next_step(),
                        token_ids=torch.tensor(chunk),
                        segments=torch.tensor([[slot, start, len(chunk)]], dtype=torch.int32),
                        emits=torch.zeros(1, dtype=torch.int64),
                    )
                )
                in_flight.append((index, start))
        while in_flight:
            yield (*in_flight.popleft(), self._result().values)

    def _result(self) -> Result:
        result = self.pipeline.result()
        assert result is not None
        return result

    def _next_step(self) -> int:
        self._step += 1
        return self._step

    def _admit(self, waiting: deque[Request], free_slots: deque[int], lanes: deque[_Lane]) -> None:
        while waiting and free_slots:
            request = waiting.popleft()
            request.slot = free_slots.popleft()
            lane = min(lanes, key=lambda lane: (len(lane.requests), lane.index))
            lane.requests.append(request)

    def _chunk(self, num_prompt_tokens: int) -> int:
        return schedule.prefill_chunk(
            num_prompt_tokens, self.num_stages, self.smallest_chunk, self.prefill_chunk
        )

    def _next(
        self, lanes: deque[_Lane], chunk: int
    ) -> tuple[_Lane, MicroBatch, list[Request]] | None:
        """The micro-batch of the lane that waited longest among those with something to run."""
        for position, lane in enumerate(lanes):
            parts = self._form(lane, chunk)
            if parts is None:
                continue
            # A lane whose prompts are not through keeps its turn: the next chunk waits for nothing.
            if not any(request.num_prompt_left for request in lane.requests):
                del lanes[position]
                lanes.append(lane)
            return lane, *parts
        return None

    def _form(self, lane: _Lane, chunk: int) -> tuple[MicroBatch, list[Request]] | None:
        prefills = any(request.num_prompt_left for request in lane.requests)
        if not prefills and any(request.pending for request in lane.requests):
            return None  # sequences that were prefilled apart decode together
        budget = chunk
        token_ids: list[int] = []
        segments, emits, starts, settings, emitting = [], [], [], [], []
        for request in lane.requests:
            start = request.num_submitted
            if request.pending:
                continue
            if request.num_prompt_left:
                count = min(request.num_prompt_left, budget)
                if not count:
                    continue
                budget -= count
                if start == 0:
                    starts.append((request.slot, request.seed))
                    settings.append(_sampling_row(request))
                token_ids += request.prompt_ids[start : start + count]
            else:
                count = 1
                token_ids.append(request.token_ids[-1])
            request.num_submitted += count
            emit = not request.num_prompt_left
            segments.append((request.slot, start, count))
            emits.append(int(emit))
            if emit:
                request.pending = True
                emitting.append(request)
        if not segments:
            return None
        micro_batch = MicroBatch(
            Kind.STEP,
            lane=lane.index,
            step=self._next_step(),
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            segments=torch.tensor(segments, dtype=torch.int32),
            emits=torch.tensor(emits, dtype=torch.int64),
            starts=torch.tensor(starts, dtype=torch.int64).view(-1, 2),
            settings=torch.tensor(settings, dtype=torch.float64).view(-1, len(SAMPLING_FIELDS)),
        )
        return micro_batch, emitting

    def _take(self, request: Request, token_id: int) -> Token:
        if token_id == NOT_A_TOKEN:
            raise RuntimeError(
                f"generate: logits of prompt {request.index} at position {request.num_submitted} "
                "must be numbers, got NaN; check the checkpoint, or use a wider dtype"
            )
        request.pending = False
        request.token_ids.append(token_id)
        piece = request.text.push(token_id)
        if token_id in self.eos_token_ids:
            request.finish_reason = "eos"
        elif request.text.stopped:
            request.finish_reason = "stop"
        elif (
            len(request.token_ids) >= request.settings.max_new_tokens
            or request.num_submitted >= self.limits.max_tokens
        ):
            request.finish_reason = "length"
        if request.finish_reason is not None:
            piece += request.text.finish()
        return Token(request.index, token_id, piece, request.finish_reason)

    def _count(self, num_without_token: int) -> None:
        self.speed.num_tokens += 1
        if num_without_token == 0 and not self.speed.prefilled:
            self.speed.prefilled = time.perf_counter()
            self.speed.num_early_tokens = self.speed.num_tokens


def _sampling_row(request: Request) -> tuple[float, ...]:
    settings = request.settings
    return (
        settings.sampling_temperature if settings.sampling else 0.0,
        float(settings.top_k or 0),
        settings.top_p if settings.top_p is not None else 1.0,
        settings.repetition_penalty,
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
