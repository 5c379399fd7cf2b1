"""Sends results whose tokens are still on their way from the GPU, so that no stage waits for them.

The last stage launches the next micro-batch meanwhile: a thread waits for the tokens and sends
them, in the order in which they were given.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from dist_int8.distributed.rendezvous import stay_on
from dist_int8.pipeline.microbatch import Result


class ResultSender:
    """A thread that waits for results and calls `send` with each.

    Args:
        send: of a result that is ready; called in the thread, as long as this is not closed.
        on_failure: called in the thread when a result cannot be sent: the stage may be waiting for
            a next micro-batch that does not come without this one.
        cores: that the thread stays on.
        size: how many results may wait: a fast stage is held back behind them.
    """

    def __init__(
        self,
        send: Callable[[Result], None],
        on_failure: Callable[[], None],
        cores: frozenset[int] = frozenset(),
        size: int = 2,
    ) -> None:
        self._send = send
        self._on_failure = on_failure
        self._cores = cores
        self._queue: queue.Queue[Result | None] = queue.Queue(maxsize=size)
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="result sender", daemon=True)
        self._thread.start()

    def put(self, result: Result) -> None:
        """Sends the result once it is ready; raises what an earlier one failed with."""
        self.raise_failure()
        self._queue.put(result)

    def finish(self) -> None:
        """Waits until every result was sent and ends the thread; raises what one failed with."""
        while self._thread.is_alive():
            with suppress(queue.Full):
                self._queue.put(None, timeout=0.1)
                self._thread.join()
        self.raise_failure()

    def close(self) -> None:
        """Ends the thread once it has sent what it has. Never waits."""
        with suppress(queue.Full):  # then the thread is at work, and a daemon
            self._queue.put_nowait(None)

    def raise_failure(self) -> None:
        """Raises what a result failed with, if one did."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        with suppress(OSError):  # cores that are gone: a wish
            stay_on(self._cores)
        while (result := self._queue.get()) is not None:
            if self._failure is not None:
                continue  # later ones of a broken connection are dropped
            try:
                result.wait()
                self._send(result)
            except Exception as error:  # raised where the stage looks next
                self._failure = error
                self._on_failure()
