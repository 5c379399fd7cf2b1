"""Sends results whose tokens are still on their way from the GPU, so that no stage waits for them.

The last stage launches the next micro-batch meanwhile: a thread waits for the tokens and sends
them, in the order in which they were given.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from dist_int8.distributed.rendezvous import stay_on
from dist_int8.pipeline.microbatch import Result


class ResultSender:
    """A thread that waits for results and calls `send` with each.

    Args:
        send: of a result that is ready; called in the thread.
        cores: that the thread stays on.
        size: how many results may wait: a fast stage is held back behind them.
    """

    def __init__(
        self, send: Callable[[Result], None], cores: frozenset[int] = frozenset(), size: int = 2
    ) -> None:
        self._send = send
        self._cores = cores
        self._queue: queue.Queue[Result] = queue.Queue(maxsize=size)
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="result sender", daemon=True).start()

    def put(self, result: Result) -> None:
        """Sends the result once it is ready; raises what an earlier one failed with."""
        self._raise()
        self._queue.put(result)

    def flush(self) -> None:
        """Waits until every result was sent; raises what one failed with."""
        self._queue.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        stay_on(self._cores)
        while True:
            result = self._queue.get()
            try:
                if self._error is None:  # later ones of a broken connection are dropped
                    result.wait()
                    self._send(result)
            except Exception as error:  # raised where the stage looks next
                self._error = error
            finally:
                self._queue.task_done()
