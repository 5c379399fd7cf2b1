"""What a rank reports about itself: a state, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dist_int8.errors import ProtocolError, RankError

# Errors that rank 0 raises as they were, so that several stages fail as one does: a damaged
# checkpoint is a ValueError on any rank. Others say only what happened to their rank.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, MemoryError, FileNotFoundError, OSError)
}


class State(StrEnum):
    """Progress of a rank, or how it ended."""

    UNKNOWN = ""  # nothing reported yet
    JOINED = "joined"
    READY = "ready"  # its stage is built
    FAILED = "failed"
    LOST = "lost"  # it lost a neighbour and can go on with a new one


@dataclass(frozen=True)
class StateReport:
    """A state and its reason: "ready", "failed: out of memory".

    Attributes:
        kind: what rank 0 raises instead of RankError; None: RankError.
    """

    state: State = State.UNKNOWN
    reason: str = ""
    kind: type[Exception] | None = None

    def __str__(self) -> str:
        return f"{self.state.value}: {self.reason}" if self.reason else self.state.value

    def pack(self) -> str:
        """The report as it travels: "failed ValueError: out of range"."""
        kind = f" {self.kind.__name__}" if self.kind else ""
        return f"{self.state.value}{kind}: {self.reason}" if self.reason else self.state.value

    @classmethod
    def parse(cls, text: str) -> StateReport:
        """The report of a text made by `pack`. Raises ProtocolError for one that no rank sends."""
        head, _, reason = text.partition(": ")
        name, _, kind = head.partition(" ")
        try:
            if head != name and kind not in _KINDS:
                raise ValueError(kind)
            return cls(State(name), reason, _KINDS.get(kind))
        except ValueError:
            raise ProtocolError(f"heartbeat: {head[:40]!r} is no state of a rank") from None

    @classmethod
    def of_error(cls, error: BaseException) -> StateReport:
        """What a rank that ends by an error reports."""
        text = " ".join(str(error).split())
        if isinstance(error, RankError):
            return cls(State.LOST, text)
        kind = next((kind for kind in _KINDS.values() if isinstance(error, kind)), None)
        name = type(error).__name__
        if kind is None:
            return cls(State.FAILED, f"{name}: {text}" if text else name)
        return cls(State.FAILED, text or name, kind)
