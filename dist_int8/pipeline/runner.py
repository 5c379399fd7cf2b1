"""Runs stages: rank 0 submits micro-batches and takes results, the other ranks serve theirs."""

from __future__ import annotations

import time
from collections import deque

from torch import Tensor

from dist_int8.distributed.world import World
from dist_int8.errors import ProtocolError, RankError
from dist_int8.pipeline import schedule
from dist_int8.pipeline.in_process import InProcessTransport
from dist_int8.pipeline.microbatch import Kind, MicroBatch, Result
from dist_int8.pipeline.stage import Stage
from dist_int8.pipeline.trace import Trace
from dist_int8.pipeline.transport import Transport

WATCH_S = 0.25  # how often rank 0 looks whether the others live while it waits for a result
JOIN_S = 5.0  # how long rank 0 waits at the end for the last stage to hang up
HANG_UP_S = 0.5  # the same where it was killed: one that is stopped or cut off never does


class Pipeline:
    """Rank 0's end of the ring: its own stage, and the way to the others and back.

    Args:
        stage: stage 0.
        world: the ranks.
        transport: links to the other stages; None when stage 0 is the only one.
    """

    def __init__(
        self, stage: Stage, world: World, transport: Transport | InProcessTransport | None
    ) -> None:
        self.stage = stage
        self.world = world
        self.transport = transport
        self.trace = Trace()
        self._under_way: deque[int] = deque()  # steps that were submitted, results to come
        self._results: deque[Result] = deque()

    def submit(self, micro_batch: MicroBatch) -> None:
        """Runs stage 0 on a micro-batch and hands it on; its Result comes from `result` later.

        Raises:
            RankError: the next rank is gone.
        """
        decodes = micro_batch.num_tokens == micro_batch.segments.shape[0]
        kind = schedule.DECODE if decodes else schedule.PREFILL
        self.trace.submitted(micro_batch.step, kind, micro_batch.lane, micro_batch.num_tokens)
        output = _timed(self.stage, micro_batch, None)
        self._under_way.append(micro_batch.step)
        if isinstance(output, Result):
            self._results.append(output)
            return
        assert self.transport is not None
        try:
            self.transport.send(micro_batch, output)
        except RankError as error:
            raise self.world.blame(error) from None

    def result(self, wait: bool = True) -> Result | None:
        """The next Result, in the order of submission; None if not `wait` and none is there.

        Raises:
            RankError: a rank ended, failed or fell silent, or no result came within step_timeout.
        """
        deadline = time.monotonic() + self.world.step_timeout_s
        while not self._results:
            if self.transport is None:
                return None
            try:
                received = self.transport.next_result(WATCH_S if wait else 0.0)
            except RankError as error:
                raise self.world.blame(error) from None
            if received is not None:
                self._take(self.transport, received)
            elif not wait:
                return None
            else:
                self.check()
                if time.monotonic() > deadline:
                    raise self.world.hung(self._under_way[0])
        self._under_way.popleft()
        done = self._results.popleft()
        self.trace.finished(done.spans)
        return done

    def _take(self, transport: Transport | InProcessTransport, received: Result) -> None:
        """Keeps a result, unless it answers nothing that was asked."""
        asked = self._under_way[0] if self._under_way else None
        if received.step == asked:
            self._results.append(received)
        else:
            transport.refuse(ProtocolError(f"result: step must be {asked}, got {received.step}"))

    def check(self) -> None:
        """Raises RankError, naming the rank and its reason, if one failed, ended or fell silent."""
        try:
            self.world.check()
        except RankError as error:
            raise self.world.blame(error) from None

    def reconnect(self, transport: Transport) -> None:
        """Goes on with other links; what was under way is forgotten."""
        self.transport = transport
        self._results.clear()
        self._under_way.clear()
        self.trace.forget_submitted()

    def close(self) -> None:
        """Asks every stage to end after what is in flight, and waits for it."""
        if self.transport is not None:
            self.transport.send(MicroBatch(Kind.SHUTDOWN), None)
            self.transport.flush()
        self.world.close()
        self._join(JOIN_S)

    def kill(self) -> None:
        """Ends every rank at once, for when they cannot be asked to end any more."""
        self.world.kill()
        self._join(HANG_UP_S)

    def _join(self, patience_s: float) -> None:
        if self.transport is not None:
            self.transport.join(patience_s)


def _timed(stage: Stage, micro_batch: MicroBatch, hidden_states: Tensor | None) -> Tensor | Result:
    """Runs the stage and notes when, on what travels on."""
    started = time.time_ns()
    output = stage.run(micro_batch, hidden_states)
    micro_batch.spans.append((started, time.time_ns()))
    if isinstance(output, Result):
        output.spans = micro_batch.spans
    return output


def serve(stage: Stage, transport: Transport | InProcessTransport, world: World) -> None:
    """Runs what the rank before sends until it says SHUTDOWN.

    Raises:
        RankError: a neighbour is gone.
        ProtocolError: with NCCL, the rank before sent something else than a micro-batch.
    """
    while True:
        micro_batch, hidden_states = transport.next()
        world.received(micro_batch.step)
        if micro_batch.kind == Kind.SHUTDOWN:
            if world.rank < world.world_size - 1:
                transport.send(micro_batch, None)
            transport.flush()
            return
        try:
            output = _timed(stage, micro_batch, hidden_states)
        except ProtocolError as error:
            transport.refuse(error)
            continue
        if isinstance(output, Result):
            transport.send_result(output)
        else:
            assert isinstance(output, Tensor)
            transport.send(micro_batch, output)
        world.done(micro_batch.step)
