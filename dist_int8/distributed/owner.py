"""Whose a resource is: the process that made it. A forked child has a copy, and must not end it.

A child shares its parent's sockets, pipes and temporary folders, but none of its threads. Whatever
it tore down at its end, or sent, would be torn down or sent for its parent. So everything that can
end, or that talks to another process, has an `Owner` and does nothing in a child; and what a child
would keep open after its parent's end is closed in it by the hook at the end of this file.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol


class Inherited(Protocol):
    """What a forked child gets a copy of."""

    def let_go(self) -> None:
        """Closes, in a forked child, the copies of the parent's descriptors; takes no lock."""


class Owner:
    """The process that made something."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is that process, and not one forked from it."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises RuntimeError in a forked process."""
        if not self.is_here:
            raise RuntimeError(
                f"the model belongs to process {self._pid}, from which this process "
                f"({os.getpid()}) was forked; a forked process must load its own model, or better "
                "be started with multiprocessing's method 'spawn' and load it there"
            )


_inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()


def let_go_in_children(resource: Inherited) -> None:
    """Has processes that are forked from this one call `let_go`, and never destroy their copy.

    A descriptor that is open somewhere never closes for the other end: the ranks of a parent that
    was killed would wait for it as long as a forked child lives. And torch's process groups wait,
    when they are destroyed, for threads that a child does not have.
    """
    _inherited.add(resource)


def _after_fork() -> None:
    for resource in list(_inherited):
        resource.let_go()
        ctypes.pythonapi.Py_IncRef(ctypes.c_void_p(id(resource)))


os.register_at_fork(after_in_child=_after_fork)
