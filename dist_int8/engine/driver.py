"""The thread that runs the pipeline, so that nothing can interrupt it half-way.

A signal handler may raise in the main thread between any two instructions, and Ctrl-C does. Were a
caller to submit a micro-batch itself, its result could be left behind. Here callers only wait; an
exception that ends the wait ends no job.
"""

from __future__ import annotations

import queue
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class _Job:
    """A function to run once, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._work: Callable[[], Any] | None = work
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        assert self._work is not None
        try:
            self.result = self._work()
        except BaseException as error:  # raised again where it is awaited
            forget_frames(error)
            self.error = error
        self._work = None
        self._done.release()

    def wait(self) -> Any:
        self._done.acquire()  # a signal handler that raises ends this, and only this
        if self.error is None:
            return self.result
        try:
            raise self.error
        finally:
            self.error = None  # else error, traceback, frame and job are a cycle


class _Line(queue.SimpleQueue["_Job | None"]):
    """The jobs of one driver; None ends its thread. Apart from `Driver`, so that it can be freed.

    Attributes:
        ended: the thread takes no more jobs.
    """

    ended = False

    def work(self) -> None:
        """Runs jobs in order until None, and those that came until then."""
        while (job := self.get()) is not None:
            job.run()
            del job  # what it refers to may be freed while the next one is awaited
        self.ended = True
        self.run_rest()

    def run_rest(self) -> None:
        """Runs what was put in after the end."""
        while True:
            try:
                job = self.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job.run()


class _DriverThread(threading.Thread):
    """A thread of a driver; what it runs may outlive any other thread."""


class ThreadOwner(Protocol):
    """The process that has the thread; one forked from it has not."""

    @property
    def is_here(self) -> bool:
        """Whether this is that process."""

    def check(self) -> None:
        """Raises RuntimeError in a forked process."""


class Driver:
    """Runs jobs one after the other, in the order in which they come, in a thread of its own.

    The thread ends with `end`, or when the driver is freed.

    Args:
        owner: the process that this is.
        begin: called in the thread before any job.
    """

    def __init__(self, owner: ThreadOwner, begin: Callable[[], None] | None = None) -> None:
        self._line = _Line()
        self._owner = owner
        self._thread = _DriverThread(target=self._line.work, name="dist_int8 driver", daemon=True)
        # Before the thread starts: an exception of a signal handler may come while it does.
        weakref.finalize(self, self._line.put, None).atexit = False
        self._thread.start()
        if begin is not None:
            self.call(begin)

    @property
    def is_here(self) -> bool:
        """Whether this process has the thread, and is no fork of the one that has."""
        return self._owner.is_here

    def post(self, work: Callable[[], object]) -> None:
        """Runs a job some time. Never waits; may be called from a finalizer."""
        if self.is_here:
            self._put(_Job(work))

    def call(self, work: Callable[[], Result]) -> Result:
        """Runs a job and returns its result, or raises its exception.

        An exception from a signal handler ends the wait; the job runs to its end all the same.

        Raises:
            RuntimeError: this process is a fork of the one that loaded the model.
        """
        self._owner.check()
        job = _Job(work)
        self._put(job)
        result: Result = job.wait()
        return result

    def finish(self, work: Callable[[], object]) -> None:
        """Runs a last job and ends the thread; waits for both, unless a driver's thread calls.

        That happens when the garbage collection finds a handle in it.
        """
        if not self.is_here:
            return
        job = _Job(work)
        self._put(job)
        self._line.put(None)
        if not isinstance(threading.current_thread(), _DriverThread):
            job.wait()
            self._thread.join()

    def _put(self, job: _Job) -> None:
        self._line.put(job)
        if self._line.ended:  # the thread may have looked for the last time already
            self._line.run_rest()


def forget_frames(error: BaseException, handled: BaseException | None = None) -> None:
    """Clears the local variables of an exception's frames, which would keep tensors alive.

    In a notebook the last traceback lives until the next one.

    Args:
        error: the exception.
        handled: one that the caller was handling already; its frames are not ours.
    """
    seen: BaseException | None = error
    while seen is not None and seen is not handled:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__context__
