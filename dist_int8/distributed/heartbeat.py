"""Heartbeats: a TCP connection between rank 0 and every other rank says who is alive.

Both ends send one beat per second, whatever the rank computes or waits for. A kernel closes the
connections of a process that ends, which the other end sees at once; a process that was stopped, or
whose link was cut, falls silent. A beat of a rank above 0 carries the last micro-batch that
arrived and the last that left, so that rank 0 can tell a stage that hangs from those that wait for
it. States ("ready", "failed: why", "lost: which neighbour") and rank 0's orders go the same way.
The store of the rendezvous is not used again: its calls block when a link is cut.

A message is a fixed header and at most MAX_PAYLOAD bytes; a peer that sends anything else, or does
not know the token from the store, is disconnected. Rank 0's end is `monitor`. No torch here.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum

from dist_int8.distributed.owner import Owner
from dist_int8.distributed.states import StateReport
from dist_int8.errors import ProtocolError

BEAT_S = 1.0
TOKEN_BYTES = 16
MAX_PAYLOAD = 1024
_HEADER = struct.Struct("!IBHI")  # magic, kind, bytes of payload, generation
BEAT = struct.Struct("!qq")
RANK = struct.Struct("!I")
_MAGIC = 0x64386862  # "d8hb"


class BeatKind(IntEnum):
    """What a message is."""

    HELLO = 1  # token and rank: the first message of a rank above 0
    BEAT = 2  # last micro-batch that came and last that left
    STATE = 3  # text
    REGROUP = 4  # rank 0's order: meet again in the generation of the header
    BYE = 5  # this end is done; a closed connection is no failure from now on


class Link:
    """One end of a connection; sends never block."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.heard = time.monotonic()
        self._buffer = b""
        self._lock = threading.Lock()

    def send(self, kind: BeatKind, payload: bytes = b"", generation: int = 0) -> None:
        """Hands a message to the kernel; one that it cannot take or deliver shows as silence."""
        message = _HEADER.pack(_MAGIC, kind, len(payload), generation) + payload
        with self._lock, suppress(OSError):
            self.connection.send(message)

    def receive(self) -> list[tuple[BeatKind, int, bytes]] | None:
        """(kind, generation, payload) of what has arrived; None when the other end has closed.

        Raises:
            ProtocolError: the bytes are not a message.
        """
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        self._buffer += data
        messages = []
        while len(self._buffer) >= _HEADER.size:
            magic, kind, size, generation = _HEADER.unpack_from(self._buffer)
            if magic != _MAGIC or not 1 <= kind <= len(BeatKind) or size > MAX_PAYLOAD:
                raise ProtocolError("heartbeat: a message that no rank sends")
            end = _HEADER.size + size
            if len(self._buffer) < end:
                break
            messages.append((BeatKind(kind), generation, self._buffer[_HEADER.size : end]))
            self._buffer = self._buffer[end:]
        return messages

    def close(self) -> None:
        self.connection.close()


class Beating:
    """A daemon thread that reads messages, sends heartbeats and checks for silent peers.

    In a forked child there is no such thread, and the connections are closed.
    """

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake, wakened = socket.socketpair()
        self._selector.register(wakened, selectors.EVENT_READ)
        self._wakened = wakened
        self._closed = False
        self._owner = Owner()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def close(self) -> None:
        """Ends the thread and the connections. Safe to call twice and from the thread itself."""
        if self._closed or not self._owner.is_here:
            return
        self._closed = True
        with suppress(OSError):
            self._wake.send(b"\0")
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join()

    def let_go(self) -> None:
        """Closes the copies that a forked child has of the connections."""
        self._closed = True
        self._release()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._closed:
            wait_s = max(0.0, due - time.monotonic())
            asleep = time.monotonic()
            ready = self._selector.select(wait_s)
            paused_s = time.monotonic() - asleep - wait_s
            if paused_s > BEAT_S:  # this process itself was stopped and could not hear its peers
                self._excuse_silence(paused_s)
            for key, _ in ready:
                if key.fileobj is self._wakened:
                    self._wakened.recv(1)  # what is not read would wake it again at once
                elif not self._closed:
                    self._read(key)
            if time.monotonic() >= due and not self._closed:
                due = time.monotonic() + BEAT_S
                self._beat()
            if not self._closed:
                self._look()
        self._release()

    def _release(self) -> None:
        self._selector.close()
        self._wake.close()
        self._wakened.close()
        self._close_links()

    def _excuse_silence(self, seconds: float) -> None:
        raise NotImplementedError

    def _read(self, key: selectors.SelectorKey) -> None:
        raise NotImplementedError

    def _beat(self) -> None:
        raise NotImplementedError

    def _look(self) -> None:
        raise NotImplementedError

    def _close_links(self) -> None:
        raise NotImplementedError


class Pulse(Beating):
    """The end of a rank above 0.

    Args:
        rank: this one.
        address: "host port token" of rank 0's `Monitor`.
        timeout_s: for connecting.
        silence_s: seconds without a heartbeat after which rank 0 counts as stopped or cut off.
        on_order: called, from the thread, with the generation in which rank 0 regroups the ranks.
        on_loss: called, from the thread, with what is wrong with rank 0.

    Attributes:
        received, done: number of the micro-batch that came last and that left last.
        ending: rank 0 said that it is done.

    Raises:
        OSError: rank 0 does not listen there.
    """

    def __init__(
        self,
        rank: int,
        address: str,
        timeout_s: float,
        silence_s: float,
        on_order: Callable[[int], None],
        on_loss: Callable[[str], None],
    ) -> None:
        super().__init__("heartbeat")
        host, port, token = address.split()
        connection = socket.create_connection((host, int(port)), timeout_s)
        self.link = Link(connection)
        self.received = self.done = 0
        self.ending = False
        self._silence_s = silence_s
        self._on_order = on_order
        self._on_loss = on_loss
        self._selector.register(connection, selectors.EVENT_READ)
        self.link.send(BeatKind.HELLO, bytes.fromhex(token) + RANK.pack(rank))
        self._thread.start()

    def say(self, report: StateReport, generation: int) -> None:
        """Tells rank 0 a state; a long reason is cut."""
        text = report.pack().encode()[:MAX_PAYLOAD].decode(errors="ignore").encode()
        self.link.send(BeatKind.STATE, text, generation)

    def say_bye(self) -> None:
        """Tells rank 0 that this rank is done."""
        self.link.send(BeatKind.BYE)

    def _read(self, key: selectors.SelectorKey) -> None:
        try:
            messages = self.link.receive()
        except ProtocolError as error:
            self._lose(str(error))
            return
        if messages is None:
            self._lose("rank 0 is gone")
            return
        for kind, generation, _ in messages:
            if kind == BeatKind.REGROUP:
                self._on_order(generation)
            elif kind == BeatKind.BYE:
                self.ending = True

    def _lose(self, why: str) -> None:
        self._closed = True
        self._on_loss(why)

    def _excuse_silence(self, seconds: float) -> None:
        self.link.heard += seconds

    def _beat(self) -> None:
        self.link.send(BeatKind.BEAT, BEAT.pack(self.received, self.done))

    def _look(self) -> None:
        if time.monotonic() - self.link.heard > self._silence_s:
            self._lose(
                f"rank 0 has been silent for {self._silence_s:g} s (step_timeout): it was stopped, "
                "or the link to it was cut"
            )

    def _close_links(self) -> None:
        self.link.close()
