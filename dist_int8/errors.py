"""Every error that a caller can catch, in one tree; bad input is a ValueError of Python's.

DistInt8Error
  RankError            a rank ended or failed; the handle is closed, call load() again
    RankLostError      it fell silent
    StageTimeoutError  it lives, but its stage hangs
  RequestError         one request failed by itself; the others go on
  QueueFullError       too many requests wait
  ShuttingDownError    the model takes no new requests
  ProtocolError        bytes arrived that no rank of this pipeline sends
"""

from __future__ import annotations


class DistInt8Error(RuntimeError):
    """What goes wrong while a model runs."""


class RankError(DistInt8Error):
    """A rank of the pipeline ended or failed; the message names it.

    Attributes:
        rank, stage: which one (a rank is a stage); None where it is unknown.
        kind: what `load()` raises in its place, such as ValueError for a damaged checkpoint.
    """

    def __init__(
        self, message: str, rank: int | None = None, kind: type[Exception] | None = None
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.stage = rank
        self.kind = kind


class RankLostError(RankError):
    """Nothing was heard from a rank for step_timeout: it was stopped, or its link was cut."""


class StageTimeoutError(RankError):
    """A rank lives, but its stage did not end a step within step_timeout."""


class RequestError(DistInt8Error):
    """A request failed by itself, for example because its logits are NaN; others go on."""


class QueueFullError(DistInt8Error):
    """More requests wait than the settings allow; try again later."""


class ShuttingDownError(DistInt8Error):
    """The model is being shut down and takes no new requests."""


class ProtocolError(DistInt8Error):
    """Bytes arrived that no rank of this pipeline sends."""
