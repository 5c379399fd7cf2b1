"""One call of `Engine.run`: which of its requests are taken, and the tokens it hands out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from dist_int8.engine.requests import Request, Token
from dist_int8.errors import ShuttingDownError


class Call:
    """The requests of one call, taken bit by bit.

    Args:
        requests: any number, made lazily if need be.
        keep_going: a request that fails by itself does not end the call.

    Attributes:
        taken: requests that were made and are not queued yet.
        active: requests that are queued and whose last token has not been handed out.
        refused: whether a shutdown left some of the requests unanswered.
    """

    def __init__(self, requests: Iterable[Request], keep_going: bool) -> None:
        self.taken: list[Request] = []
        self.active: list[Request] = []
        self.refused = False
        self._left = iter(requests)
        self._has_more = True
        self._has_begun = False
        self._keep_going = keep_going
        self._ended: list[Request] = []

    @property
    def unfinished(self) -> bool:
        """Whether there are tokens to come."""
        return self._has_more or bool(self.taken or self.active)

    @property
    def waits(self) -> bool:
        """Whether nothing can be handed out before the engine makes a step."""
        return bool(self.taken or self.active) and not any(
            request.outbox or request.ended for request in self.active
        )

    def take(self, room: int) -> None:
        """Makes the next requests for which there is room, and the first one in any case.

        In the caller's thread: its iterator may do what it likes.
        """
        count = self._fitting(room) - len(self.taken) if self._has_more else 0
        batch = list(islice(self._left, max(0, count)))
        self._has_more = self._has_more and len(batch) == max(0, count)
        self.taken += batch

    def next_batch(self, room: int) -> list[Request]:
        """Lists the taken requests that are to be queued; `begin` says that they are.

        Other calls may have come in between: there may be less room than when they were taken.
        But a call whose first request finds the queue full is refused instead of waiting for room.
        """
        return self.taken[: self._fitting(room)]

    def begin(self, batch: list[Request]) -> None:
        """Notes requests that the engine has queued."""
        self.taken = self.taken[len(batch) :]
        self.active += batch
        self._has_begun = True

    def refuse_rest(self) -> None:
        """Takes no more requests."""
        self.refused |= self._has_more or bool(self.taken)
        self._has_more = False
        self.taken = []

    def _fitting(self, room: int) -> int:
        return max(room, 0 if self._has_begun else 1)

    def note_ended(self) -> None:
        """Notes which requests have their last token, under the engine's lock.

        Another call may end a request while `hand_out` is at work; its last token is then handed
        out the next time.
        """
        self._ended = [request for request in self.active if request.ended]

    def hand_out(self) -> Iterator[Token]:
        """Yields the tokens that arrived; forgets the requests that ended.

        Raises:
            ShuttingDownError: the model is being shut down.
            RequestError: a request failed by itself, unless `keep_going`.
        """
        for request in self.active:
            while request.outbox:
                yield request.outbox.popleft()
            stopped = isinstance(request.error, ShuttingDownError)
            if request.error and (stopped or not self._keep_going):
                raise request.error
            self.refused |= request.finish_reason == "cancelled"  # only a shutdown cancels it
        self.active = [request for request in self.active if request not in self._ended]
