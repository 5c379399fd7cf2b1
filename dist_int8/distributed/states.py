"""What a rank reports about itself: a state, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dist_int8.errors import ProtocolError


class State(StrEnum):
    """Progress of a rank, or how it ended."""

    UNKNOWN = ""  # nothing reported yet
    JOINED = "joined"
    READY = "ready"  # its stage is built
    FAILED = "failed"
    LOST = "lost"  # it lost a neighbour and can go on with a new one


@dataclass(frozen=True)
class StateReport:
    """A state and its reason, as they travel: "ready", "failed: out of memory"."""

    state: State = State.UNKNOWN
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state.value}: {self.reason}" if self.reason else self.state.value

    @classmethod
    def parse(cls, text: str) -> StateReport:
        """The report of this text. Raises ProtocolError for one that no rank sends."""
        name, _, reason = text.partition(": ")
        try:
            return cls(State(name), reason)
        except ValueError:
            raise ProtocolError(f"heartbeat: {name[:40]!r} is no state of a rank") from None
