"""Groups requests into lanes; each turn of a lane is one micro-batch.

A lane's micro-batch has one token of every sequence that decodes and, behind all of those, a chunk
of the prompts that are still being prefilled. Sequences of a lane decode in step, and lanes are
kept equally long, so that no stage waits for one micro-batch much longer than for the others.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from dist_int8.engine.requests import Request
from dist_int8.pipeline.microbatch import UNKNOWN_TOKEN, Kind, Limits, MicroBatch


@dataclass
class Lane:
    """The requests that share micro-batches."""

    index: int
    requests: list[Request] = field(default_factory=list)

    @property
    def prefills(self) -> bool:
        """Whether a prompt in it is not wholly submitted yet."""
        return any(request.num_prompt_left for request in self.requests)

    @property
    def decodes(self) -> bool:
        """Whether a request in it is ready to decode its next token."""
        return any(
            not request.num_pending and not request.num_prompt_left for request in self.requests
        )

    def is_ready(self, ahead: int, max_tokens: int) -> bool:
        """Whether it has a micro-batch to run: prompts at any time, decoding ones all together.

        Args:
            ahead: how many tokens of a request may be pending when another one is asked for.
            max_tokens: maximum number of tokens in a slot.
        """
        return self.prefills or (
            all(request.num_pending <= ahead for request in self.requests)
            and any(request.may_run(ahead, max_tokens) for request in self.requests)
        )


@dataclass(frozen=True)
class Turn:
    """A lane's micro-batch.

    Attributes:
        lane: the lane.
        micro_batch: what to submit.
        emitting: the requests whose next token it yields, in the order of the result.
    """

    lane: Lane
    micro_batch: MicroBatch
    emitting: list[Request]


class Lanes:
    """All lanes, in the order of their turns.

    Args:
        num_lanes: number of lanes.
        limits: slots and tokens of the KV cache.
        ahead: how many tokens of a request may be pending when another one is asked for.
    """

    def __init__(self, num_lanes: int, limits: Limits, ahead: int = 0) -> None:
        self._turns = deque(Lane(index) for index in range(num_lanes))
        self._rule = (ahead, limits.max_tokens)
        self.free_slots = deque(range(limits.num_slots))

    @property
    def running(self) -> list[Request]:
        """The requests that hold a slot."""
        return [request for lane in self._turns for request in lane.requests]

    @property
    def answering(self) -> bool:
        """Whether a request has its prompt submitted and its answer unfinished."""
        return any(not request.num_prompt_left for lane in self._turns for request in lane.requests)

    def admit(self, request: Request) -> None:
        """Gives the request a slot in the shortest lane. There must be a free slot."""
        if not self.running:  # a new start takes the lanes in order, whatever ran before
            self._turns = deque(sorted(self._turns, key=lambda lane: lane.index))
        request.slot = self.free_slots.popleft()
        min(self._turns, key=lambda lane: (len(lane.requests), lane.index)).requests.append(request)

    def release(self, request: Request) -> None:
        """Removes a request that ended from its lane and frees its slot."""
        for lane in self._turns:
            if request in lane.requests:
                lane.requests.remove(request)
                self.free_slots.append(request.slot)

    def next(self, chunk: int, step: int) -> Turn | None:
        """Forms the turn of the lane that waited longest among those with something to run.

        Prefill goes lane by lane, so that the first can decode early, but lets a lane that decodes
        go first: a long prompt must not hold up answers under way.

        Args:
            chunk: maximum number of prompt tokens in the micro-batch.
            step: number of the micro-batch.
        """
        share = -(-len(self.running) // len(self._turns))
        for lane in self._turns:
            self._level(lane, share)
        for position, lane in enumerate(self._turns):
            if not lane.is_ready(*self._rule):
                continue
            turn = self._form(lane, chunk, step)
            decoder_waits = any(
                other.is_ready(*self._rule) and other.decodes
                for other in self._turns
                if other is not lane
            )
            if not lane.prefills or decoder_waits:
                del self._turns[position]
                self._turns.append(lane)
            return turn
        return None

    def _level(self, lane: Lane, share: int) -> None:
        """Moves requests beyond a lane's share, ceil(running / lanes), to the shortest lane."""
        idle = [request for request in lane.requests if not request.num_pending]
        while len(lane.requests) > share and idle:
            moved = idle.pop()
            lane.requests.remove(moved)
            shortest = min(self._turns, key=lambda other: (len(other.requests), other.index))
            shortest.requests.append(moved)

    def _form(self, lane: Lane, chunk: int, step: int) -> Turn:
        token_ids: list[int] = []
        segments, emits, starts, settings, rules, emitting = [], [], [], [], [], []
        # On a GPU another kernel serves the first tokens than the prompts behind them.
        for request in sorted(lane.requests, key=lambda request: request.num_prompt_left > 0):
            start = request.num_submitted
            if not request.may_run(*self._rule):
                continue
            if request.num_prompt_left:
                count = min(request.num_prompt_left, chunk)
                if not count:
                    continue
                chunk -= count
                if start == 0:
                    starts.append((request.slot, request.seed))
                    settings.append(_sampling_row(request))
                    rules += [(request.slot, rule) for rule in request.rules]
                token_ids += request.prefill_ids[start : start + count]
            else:
                count = 1
                token_ids.append(UNKNOWN_TOKEN if request.num_pending else request.token_ids[-1])
            request.num_submitted += count
            emit = not request.num_prompt_left
            segments.append((request.slot, start, count))
            emits.append(int(emit))
            if emit:
                request.num_pending += 1
                emitting.append(request)
        assert segments, "a lane that is ready has something to run"
        micro_batch = MicroBatch(
            Kind.STEP,
            lane=lane.index,
            step=step,
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            segments=torch.tensor(segments, dtype=torch.int32),
            emits=torch.tensor(emits, dtype=torch.int64),
            rules=rules,
        )
        if starts:
            micro_batch.starts = torch.tensor(starts, dtype=torch.int64)
            micro_batch.settings = torch.tensor(settings, dtype=torch.float64)
        return Turn(lane, micro_batch, emitting)


def _sampling_row(request: Request) -> tuple[float, ...]:
    settings = request.settings
    return (
        settings.sampling_temperature if settings.sampling else 0.0,
        float(settings.top_k or 0),
        settings.top_p if settings.top_p is not None else 1.0,
        settings.min_p or 0.0,
        settings.repetition_penalty,
        settings.presence_penalty,
        settings.frequency_penalty,
        float(len(request.prompt_ids)),
    )
