"""The ranks of one pipeline as one of them sees it: its place, its connections and its end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dist_int8.distributed import diagnosis
from dist_int8.distributed.children import Children
from dist_int8.distributed.heartbeat import Pulse
from dist_int8.distributed.logs import RankLogger
from dist_int8.distributed.monitor import Monitor
from dist_int8.distributed.owner import Owner, let_go_in_children
from dist_int8.distributed.states import State, StateReport
from dist_int8.errors import RankError, RankLostError

SHUTDOWN_TIMEOUT_S = 5.0
POLL_S = 0.1
STEP_TIMEOUT_S = 300.0
LEAVE_S = 3.0  # for a rank without rank 0 to report a better reason than the lost heartbeat
BYE_S = 30.0  # for a rank to end after rank 0 said that it is done


@dataclass(eq=False)
class World:
    """The ranks of one pipeline as one of them sees it.

    Attributes:
        rank, world_size: this process's place.
        step_timeout_s: longest wait for a step, and for a sign of life of a rank.
        cores: CPU cores of this rank; empty: any.
        listen_on: where this rank listens for the others; see `interfaces.choose`.
        monitor: rank 0's end of the heartbeats; None on other ranks, and when there is only one.
        pulse: the end of a rank above 0.
        children: processes of the ranks that this one started, by rank.
        groups: process groups by device type, "cpu" (gloo) and for GPUs "cuda" (NCCL). They are
            this pipeline's own, beside torch's default group: a session can hold several pipelines.
        generation: number of times the ranks have regrouped.
        ordered: on a rank above 0, the generation that rank 0 asked for.
        owner: this process; a forked child ends nothing and sends nothing.
        abort: interrupts what waits for another rank in this process; set by the waiting code.
    """

    rank: int
    world_size: int
    step_timeout_s: float = STEP_TIMEOUT_S
    cores: frozenset[int] = frozenset()
    listen_on: dict[str, str] = field(default_factory=dict)
    monitor: Monitor | None = None
    pulse: Pulse | None = None
    children: Children = field(default_factory=Children)
    groups: dict[str, Any] = field(default_factory=dict)
    generation: int = 0
    ordered: int = 0
    owner: Owner = field(default_factory=Owner)
    abort: Callable[[], None] | None = None
    _order: threading.Event = field(default_factory=threading.Event)
    _closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        let_go_in_children(self)

    def let_go(self) -> None:
        """Closes the copies that a forked child has of pipes and connections to other ranks."""
        self.children.let_go()
        for beating in (self.monitor, self.pulse):
            if beating is not None:
                beating.let_go()

    @property
    def others(self) -> range:
        """The other ranks, on rank 0."""
        return range(1, self.world_size)

    def report(self, state: State, reason: str = "") -> None:
        """Tells rank 0 this rank's state, and why where it failed or lost a neighbour."""
        if self.pulse is not None:
            self.pulse.say(StateReport(state, reason), self.generation)

    def report_error(self, error: BaseException) -> None:
        """Tells rank 0 that this rank ends by an error."""
        if self.pulse is not None:
            self.pulse.say(StateReport.of_error(error), self.generation)

    def received(self, step: int) -> None:
        """Records, for rank 0, that a micro-batch arrived."""
        if self.pulse is not None:
            self.pulse.received = step

    def done(self, step: int) -> None:
        """Records, for rank 0, that a micro-batch was sent on."""
        if self.pulse is not None:
            self.pulse.done = step

    def check(self) -> None:
        """Raises RankError, naming the rank and its reason, if one failed, ended or fell silent."""
        cause = self._cause()
        if cause is not None:
            raise cause

    def find_cause(self, error: RankError, patience_s: float = 1.0) -> RankError:
        """Returns the error of the rank that caused `error`, or `error` if none shows in time.

        A closed connection is seen before the process that closed it is reaped or its reason read,
        and a rank may fail only because its neighbour did.
        """
        deadline = time.monotonic() + patience_s
        while True:
            cause = self._cause(with_victims=False)
            if cause is not None:
                return cause
            if time.monotonic() > deadline:
                return self._cause() or error
            time.sleep(POLL_S)

    def _cause(self, with_victims: bool = True) -> RankError | None:
        if self.monitor is None:
            return None
        return diagnosis.find_cause(self.monitor, self.children, with_victims)

    def lost(self, error: RankError) -> set[int]:
        """The started ranks that cannot go on; see `diagnosis.find_lost`."""
        assert self.monitor is not None
        return diagnosis.find_lost(self.monitor, self.children, error)

    def hung(self, step: int) -> RankError:
        """The stage that holds up micro-batch `step`; see `diagnosis.find_hung`."""
        return diagnosis.find_hung(self.monitor, step, self.step_timeout_s)

    def wait_for(self, state: State, timeout_s: float) -> None:
        """Waits until every other rank has reported this state, JOINED or READY.

        Raises:
            RankError: a rank failed or ended, or did not get there in time.
        """
        assert self.monitor is not None
        deadline = time.monotonic() + timeout_s
        while True:
            states = {rank: peer.report.state for rank, peer in self.monitor.peers.items()}
            missing = [rank for rank, said in states.items() if said not in (state, State.READY)]
            if not missing:
                return
            self.check()
            if time.monotonic() > deadline:
                names = ", ".join(map(str, missing))
                lacks = "has not joined" if state == State.JOINED else "is not ready"
                raise RankLostError(
                    f"rank {names} of {self.world_size} {lacks} after {timeout_s:g} s; "
                    "check that the launcher started it",
                    missing[0],
                )
            time.sleep(POLL_S / 5)

    def wait_for_order(self) -> int:
        """Waits, on a rank above 0, for rank 0's order to regroup; returns the generation."""
        self._order.wait()
        self._order.clear()
        return self.ordered

    def watch(self, address: str, timeout_s: float) -> None:
        """Begins the heartbeats of a rank above 0; without rank 0 this process ends from now on.

        Raises:
            RankError: rank 0 cannot be reached.
        """
        try:
            self.pulse = Pulse(
                self.rank,
                address,
                timeout_s,
                self.step_timeout_s,
                self._obey,
                self._leave_without_rank_0,
            )
        except OSError as error:
            raise RankLostError(
                f"rank 0 does not answer at {address.split()[0]}: {error}", 0
            ) from None

    def close(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Ends heartbeats, process groups and every started rank. Safe to call twice."""
        self._end(timeout_s, on_purpose=True)

    def kill(self) -> None:
        """Ends the started ranks at once, when they can no longer be asked to end.

        Ranks of a launcher see the closed connection and end by themselves.
        """
        if self.monitor is not None:
            self.monitor.on_loss = None  # what is noticed from now on was meant
        self.children.kill()
        self._end(SHUTDOWN_TIMEOUT_S, on_purpose=False)

    def _end(self, timeout_s: float, on_purpose: bool) -> None:
        if not self.owner.is_here:
            return
        self._closed.set()
        beating = self.monitor or self.pulse
        if beating is not None and on_purpose:
            beating.say_bye()
        self.children.end_all(timeout_s)
        if beating is not None:
            beating.close()
        self.groups.clear()

    def _obey(self, generation: int) -> None:
        self.ordered = generation
        self._order.set()
        if self.abort is not None:
            self.abort()

    def _leave_without_rank_0(self, why: str) -> None:
        """Ends this process soon, whatever it waits for: without rank 0 it has no purpose."""

        def leave() -> None:
            if not self._closed.wait(BYE_S if self.pulse and self.pulse.ending else LEAVE_S):
                RankLogger(__name__, self.rank).error("%s", why)
                os._exit(1)

        threading.Thread(target=leave, name="leave", daemon=True).start()


def alone(step_timeout_s: float = STEP_TIMEOUT_S) -> World:
    """The world of a pipeline in one process: no heartbeats, no process group."""
    return World(rank=0, world_size=1, step_timeout_s=step_timeout_s)
