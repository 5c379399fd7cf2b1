"""Runs stages: rank 0 submits micro-batches and takes results, the other ranks serve theirs."""

from __future__ import annotations

import time
from collections import deque

from torch import Tensor

from dist_int8.distributed import RankDied, World
from dist_int8.pipeline import schedule
from dist_int8.pipeline.microbatch import Kind, MicroBatch, Result
from dist_int8.pipeline.stage import Stage
from dist_int8.pipeline.trace import Trace
from dist_int8.pipeline.transport import Transport

WATCH_S = 0.25  # how often rank 0 looks whether the others live while it waits for a result
JOIN_S = 5.0  # how long rank 0 waits at the end for the last stage to hang up


class Pipeline:
    """Rank 0's end of the ring: its own stage, and the way to the others and back.

    Args:
        stage: stage 0.
        world: the ranks.
        transport: links to the other ranks; None when stage 0 is the only one.
        step_timeout_s: longest wait for a result before the stages count as hung.
    """

    def __init__(
        self, stage: Stage, world: World, transport: Transport | None, step_timeout_s: float
    ) -> None:
        self.step_timeout_s = step_timeout_s
        self.stage = stage
        self.world = world
        self.transport = transport
        self.in_flight = 0
        self.trace = Trace()
        self._results: deque[Result] = deque()

    def submit(self, micro_batch: MicroBatch) -> None:
        """Runs stage 0 on a micro-batch and hands it on; its Result comes from `result` later.

        Raises:
            RankDied: the next rank is gone.
        """
        decodes = micro_batch.num_tokens == micro_batch.segments.shape[0]
        kind = schedule.DECODE if decodes else schedule.PREFILL
        self.trace.submitted(micro_batch.step, kind, micro_batch.lane, micro_batch.num_tokens)
        output = _timed(self.stage, micro_batch, None)
        self.in_flight += 1
        if isinstance(output, Result):
            self._results.append(output)
            return
        assert self.transport is not None
        try:
            self.transport.send(micro_batch, output)
        except RankDied as error:
            raise self.world.blame(error) from None

    def result(self, wait: bool = True) -> Result | None:
        """The next Result, in the order of submission; None if not `wait` and none is there.

        Raises:
            RankDied: a rank ended or failed, or no result came within step_timeout_s.
        """
        deadline = time.monotonic() + self.step_timeout_s
        while not self._results:
            if self.transport is None:
                return None
            try:
                received = self.transport.next_result(WATCH_S if wait else 0.0)
            except RankDied as error:
                raise self.world.blame(error) from None
            if received is not None:
                self._results.append(received)
            elif not wait:
                return None
            else:
                self._check()
                if time.monotonic() > deadline:
                    raise RankDied(
                        f"no result after {self.step_timeout_s:.0f} s (step_timeout): a stage hangs"
                    )
        self.in_flight -= 1
        done = self._results.popleft()
        self.trace.finished(done.spans)
        return done

    def _check(self) -> None:
        try:
            self.world.check()
        except RankDied as error:
            raise self.world.blame(error) from None

    def close(self) -> None:
        """Asks every stage to end after what is in flight, and waits for it."""
        if self.transport is not None:
            self.transport.send(MicroBatch(Kind.SHUTDOWN), None)
            self.transport.flush()
        self.world.close()
        self._join()

    def kill(self) -> None:
        """Ends every rank at once, for when they cannot be asked to end any more."""
        self.world.kill()
        self._join()

    def _join(self) -> None:
        if self.transport is not None:
            self.transport.join(JOIN_S)


def _timed(stage: Stage, micro_batch: MicroBatch, hidden_states: Tensor | None) -> Tensor | Result:
    """Runs the stage and notes when, on what travels on."""
    started = time.time_ns()
    output = stage.run(micro_batch, hidden_states)
    micro_batch.spans.append((started, time.time_ns()))
    if isinstance(output, Result):
        output.spans = micro_batch.spans
    return output


def serve(stage: Stage, transport: Transport, last: bool) -> None:
    """Runs what the rank before sends until it says SHUTDOWN.

    Raises:
        RankDied: a neighbour is gone.
        BadMessage: the rank before sent something else than a micro-batch.
    """
    while True:
        micro_batch, hidden_states = transport.next()
        if micro_batch.kind == Kind.SHUTDOWN:
            if not last:
                transport.send(micro_batch, None)
            transport.flush()
            return
        output = _timed(stage, micro_batch, hidden_states)
        if isinstance(output, Result):
            transport.send_result(output)
        else:
            assert isinstance(output, Tensor)
            transport.send(micro_batch, output)
