"""Runs stages: rank 0 submits micro-batches and takes results, the other ranks serve theirs."""

from __future__ import annotations

import math
import time
from collections import deque

from torch import Tensor

from dist_int8.distributed.world import World
from dist_int8.errors import ProtocolError, RankError
from dist_int8.pipeline import schedule
from dist_int8.pipeline.clock import read_spans
from dist_int8.pipeline.in_process import InProcessTransport
from dist_int8.pipeline.microbatch import Kind, MicroBatch, Result
from dist_int8.pipeline.stage import Stage, give_back_memory
from dist_int8.pipeline.trace import Trace
from dist_int8.pipeline.transport import Transport

WATCH_S = 0.25  # interval at which rank 0 checks the other ranks while it waits for a result
JOIN_S = 5.0  # time that rank 0 gives the last stage to close its connection at the end
HANG_UP_S = 0.5  # the same after a kill: a rank that is stopped or cut off never closes it


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
        self._in_flight: deque[int] = deque()  # steps submitted whose result has not come
        self._results: deque[Result] = deque()
        self._given_up_at = math.inf

    def submit(self, micro_batch: MicroBatch) -> None:
        """Runs stage 0 on a micro-batch and sends it on; `result` returns its Result later.

        Raises:
            RankError: the next rank is gone.
            RuntimeError: this process was forked from the one that made the pipeline.
        """
        self.world.owner.check()
        decodes = micro_batch.num_tokens == micro_batch.segments.shape[0]
        kind = schedule.DECODE if decodes else schedule.PREFILL
        self.trace.submitted(micro_batch.step, kind, micro_batch.lane, micro_batch.num_tokens)
        output = _timed(self.stage, micro_batch, None)
        self._in_flight.append(micro_batch.step)
        if isinstance(output, Result):
            self._results.append(output)
            return
        assert self.transport is not None
        try:
            self.transport.send(micro_batch, output)
        except RankError as error:
            raise self.world.find_cause(error) from None

    def result(self, wait: bool = True) -> Result | None:
        """Returns the next Result in the order of submission; None if not `wait` and none has come.

        Raises:
            RankError: a rank ended, failed or fell silent, or no result came within step_timeout.
        """
        self.world.owner.check()
        deadline = time.monotonic() + self.world.step_timeout_s
        while not self._results:
            if self.transport is None:
                return None
            try:
                received = self.transport.next_result(WATCH_S if wait else 0.0)
            except RankError as error:
                raise self.world.find_cause(error) from None
            if received is not None:
                self._take(self.transport, received)
            elif not wait:
                return None
            else:
                self.check()
                if time.monotonic() > min(deadline, self._given_up_at):
                    raise self.world.hung(self._in_flight[0])
        if not wait and not self._results[0].is_ready():
            return None
        self._in_flight.popleft()
        done = self._results.popleft()
        done.wait()
        self.trace.finished(read_spans(done.spans))
        return done

    def _take(self, transport: Transport | InProcessTransport, received: Result) -> None:
        """Keeps the result of the oldest step in flight; refuses any other."""
        expected = self._in_flight[0] if self._in_flight else None
        if received.step == expected:
            self._results.append(received)
        else:
            transport.refuse(ProtocolError(f"result: step must be {expected}, got {received.step}"))

    def check(self) -> None:
        """Raises RankError, naming the rank and its reason, if one failed, ended or fell silent."""
        try:
            self.world.check()
        except RankError as error:
            raise self.world.find_cause(error) from None

    def give_up_at(self, deadline: float) -> None:
        """Waits for no result beyond this time of the monotonic clock. From any thread."""
        self._given_up_at = deadline

    def reconnect(self, transport: Transport) -> None:
        """Continues over new links; what was in flight is dropped."""
        self.transport = transport
        self._results.clear()
        self._in_flight.clear()
        self.trace.forget_submitted()

    def close(self) -> None:
        """Asks every stage to end after what is in flight, and waits for it."""
        if not self.world.owner.is_here:  # they are the parent's
            return
        if self.transport is not None:
            self.transport.send(MicroBatch(Kind.SHUTDOWN), None)
            self.transport.flush()
        self.world.close()
        self._join(JOIN_S)

    def kill(self) -> None:
        """Ends every rank at once, for when they cannot be asked to end any more."""
        if not self.world.owner.is_here:
            return
        self.world.kill()
        self._join(HANG_UP_S)

    def release(self) -> None:
        """Frees the stage and the links, whoever still refers to this; nothing works afterwards."""
        del self.stage
        self.transport = None
        self._results.clear()
        self.world.children.start = None  # it refers to the world that it is in
        if self.world.monitor is not None:
            self.world.monitor.on_loss = None
        give_back_memory()

    def _join(self, patience_s: float) -> None:
        if self.transport is not None:
            self.transport.join(patience_s)


def _timed(stage: Stage, micro_batch: MicroBatch, hidden_states: Tensor | None) -> Tensor | Result:
    """Runs the stage and appends the time span to what travels on."""
    started = stage.clock.start()
    output = stage.run(micro_batch, hidden_states)
    micro_batch.spans.append(stage.clock.stop(started))
    if isinstance(output, Result):
        output.spans = micro_batch.spans
    return output


def serve(stage: Stage, transport: Transport | InProcessTransport, world: World) -> None:
    """Runs what the previous rank sends until it sends SHUTDOWN.

    Raises:
        RankError: a neighbour is gone.
        ProtocolError: with NCCL, the previous rank sent something other than a micro-batch.
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
