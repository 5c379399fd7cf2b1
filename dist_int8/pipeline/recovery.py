"""Recovery after a rank was lost: rank 0 restarts it, and the ranks form new process groups.

Ranks that survive keep their weights: they drop their connections, wait for rank 0's order and form
new process groups, under a new generation. Should that fail, the next attempt restarts every rank
above 0. The engine then replays the running sequences from their tokens. Only for ranks that
`load()` started itself: ranks of a launcher are restarted by the launcher.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dist_int8.distributed import spawn
from dist_int8.distributed.logs import RankLogger
from dist_int8.distributed.states import State
from dist_int8.distributed.world import World
from dist_int8.errors import RankError
from dist_int8.pipeline.runner import Pipeline, serve
from dist_int8.pipeline.stage import Stage
from dist_int8.pipeline.transport import Transport


@dataclass(frozen=True)
class Links:
    """How this rank is connected, and how it reconnects.

    Attributes:
        world: the ranks.
        connect: opens the links to the neighbours in the current process groups.
        uses_nccl: whether hidden states travel over NCCL.
        rendezvous_timeout_s: within which ranks must have joined.
        load_timeout_s: within which stages must be ready.
    """

    world: World
    connect: Callable[[], Transport]
    uses_nccl: bool
    rendezvous_timeout_s: float
    load_timeout_s: float


class Recovery:
    """Rank 0's part.

    Args:
        links: of rank 0.
        max_recoveries: attempts in all, failed ones included.
    """

    def __init__(self, links: Links, max_recoveries: int) -> None:
        self.links = links
        self.max_recoveries = max_recoveries
        self.num_recoveries = 0
        self._log = RankLogger(__name__, rank=0)

    def restore(self, pipeline: Pipeline, error: RankError) -> None:
        """Restores the pipeline after a rank was lost, or raises.

        What was in flight is lost. A warning in the log says what happened.

        Raises:
            RankError: the error itself or, where a restart failed, its error, once max_recoveries
                are spent.
        """
        world = self.links.world
        lost = world.lost(error)
        while True:
            if self.num_recoveries >= self.max_recoveries or not lost:
                raise error
            self.num_recoveries += 1
            started = time.monotonic()
            try:
                if pipeline.transport is not None:
                    pipeline.transport.abort()
                spawn.regroup(world, lost, self.links.uses_nccl, self.links.rendezvous_timeout_s)
                transport = self.links.connect()
                world.wait_for(State.READY, self.links.load_timeout_s)
                pipeline.reconnect(transport)
            except RankError as again:
                error, lost = world.find_cause(again), set(world.others)
                continue
            names = ", ".join(map(str, sorted(lost)))
            self._log.warning(
                "recovery %d of %d: %s; restarted rank %s in %.1f s",
                self.num_recoveries,
                self.max_recoveries,
                error,
                names,
                time.monotonic() - started,
            )
            return


def serve_until_shutdown(stage: Stage, links: Links, recover: bool) -> None:
    """Serves the stage of a rank above 0 until rank 0 sends SHUTDOWN.

    Raises:
        RankError: a neighbour is gone, and `recover` is off.
        ProtocolError: see `serve`.
    """
    world = links.world
    met = True
    while True:
        transport = None
        try:
            if not met:
                spawn.rejoin(world, links.uses_nccl, links.rendezvous_timeout_s)
            transport = links.connect()
            world.abort = transport.abort
            world.report(State.READY)
            serve(stage, transport, world)
            world.close()
            return
        except RankError as error:
            if not recover:
                raise
            met, world.abort = False, None
            world.report(State.LOST, " ".join(str(error).split()))
            if transport is not None:
                transport.abort()  # so that the neighbours notice as well
