"""Rank 0's end of the heartbeats: which ranks joined, their progress, which are gone or silent."""

from __future__ import annotations

import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from dist_int8.distributed.heartbeat import BEAT, RANK, TOKEN_BYTES, Beating, BeatKind, Link
from dist_int8.distributed.states import State, StateReport
from dist_int8.errors import ProtocolError

MAX_UNIDENTIFIED = 64  # connections that have not identified themselves


@dataclass
class Peer:
    """State of another rank as rank 0 knows it.

    Attributes:
        link: to it; None before it joined.
        report: its last report.
        received, done: number of the micro-batch that came last and that left last.
        gone: its connection closed before it said goodbye.
        ended: it said goodbye.
    """

    link: Link | None = None
    report: StateReport = field(default_factory=StateReport)
    received: int = 0
    done: int = 0
    gone: bool = False
    ended: bool = False


class Monitor(Beating):
    """Rank 0's end: listens until every other rank has joined, then receives their heartbeats.

    Args:
        ranks: the other ranks.
        host: address to listen on.
        silence_s: seconds without a heartbeat after which a rank counts as stopped or cut off.

    Attributes:
        peers: the other ranks, by number.
        on_loss: called from a thread of its own when a rank is gone or silent, once per generation.
    """

    def __init__(self, ranks: range, host: str, silence_s: float) -> None:
        super().__init__("heartbeats")
        self.peers = {rank: Peer() for rank in ranks}
        self.generation = 0
        self.silence_s = silence_s
        self.on_loss: Callable[[], None] | None = None
        self._host = host
        self._unidentified: set[Link] = set()
        self._listener: socket.socket | None = None
        self._noticed = False
        self.address = self._listen()
        self._thread.start()

    def is_silent(self, rank: int) -> bool:
        """Whether a joined rank whose connection is open has not been heard for silence_s."""
        peer = self.peers[rank]
        if peer.link is None or peer.gone or peer.ended:
            return False
        return time.monotonic() - peer.link.heard > self.silence_s

    def regroup(self, lost: set[int]) -> str:
        """Begins a new generation: surviving ranks are told, restarted ones may join.

        Returns:
            The address at which restarted ranks report.
        """
        self.generation += 1
        for rank in lost:
            link = self.peers[rank].link
            self.peers[rank] = Peer()
            if link is not None:
                self._drop(link)
        self.address = self._listen()
        with suppress(OSError):
            self._wake.send(b"\0")  # the thread must select on the listener too
        for peer in self.peers.values():
            peer.report, peer.received, peer.done = StateReport(), 0, 0
            if peer.link is not None:
                peer.link.send(BeatKind.REGROUP, generation=self.generation)
        self._noticed = False
        return self.address

    def say_bye(self) -> None:
        """Tells every rank that the connection will be closed on purpose."""
        for peer in self.peers.values():
            if peer.link is not None:
                peer.link.send(BeatKind.BYE)

    def _listen(self) -> str:
        """Listens on a free port; returns "host port token" for the ranks that are to join."""
        self._token = os.urandom(TOKEN_BYTES)
        family = socket.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((self._host, 0))
        listener.listen(MAX_UNIDENTIFIED)
        listener.setblocking(False)
        if self._listener is not None:
            self._stop_listening()
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)
        return f"{self._host} {listener.getsockname()[1]} {self._token.hex()}"

    def _stop_listening(self) -> None:
        assert self._listener is not None
        self._selector.unregister(self._listener)
        self._listener.close()
        self._listener = None

    def _read(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._listener:
            self._accept()
            return
        link = key.data
        if link is None or key.fileobj.fileno() < 0:  # type: ignore[union-attr]  # dropped meanwhile
            return
        try:
            messages = link.receive()
            for message in messages or ():
                self._take(link, *message)
        except (ProtocolError, struct.error, UnicodeDecodeError):
            messages = None
        if messages is None:
            for peer in self.peers.values():
                if peer.link is link:
                    peer.gone = not peer.ended
            self._drop(link)

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError):
            connection, _ = self._listener.accept()
            if len(self._unidentified) >= MAX_UNIDENTIFIED:
                connection.close()
                return
            link = Link(connection)
            self._unidentified.add(link)
            self._selector.register(connection, selectors.EVENT_READ, link)

    def _take(self, link: Link, kind: BeatKind, generation: int, payload: bytes) -> None:
        if link in self._unidentified:
            self._greet(link, kind, payload)
            return
        peer = next(peer for peer in self.peers.values() if peer.link is link)
        if kind == BeatKind.BYE:
            peer.ended = True
        elif kind == BeatKind.BEAT:
            peer.received, peer.done = BEAT.unpack(payload)
        elif kind == BeatKind.STATE and generation == self.generation:
            peer.report = StateReport.parse(payload.decode())
        elif kind != BeatKind.STATE:
            raise ProtocolError(f"heartbeat: kind {kind} is sent by rank 0 only")

    def _greet(self, link: Link, kind: BeatKind, payload: bytes) -> None:
        if kind != BeatKind.HELLO or payload[:TOKEN_BYTES] != self._token:
            raise ProtocolError("heartbeat: the token is not of this pipeline")
        (rank,) = RANK.unpack(payload[TOKEN_BYTES:])
        if rank not in self.peers or self.peers[rank].link is not None:
            raise ProtocolError(f"heartbeat: rank {rank} has joined already")
        self._unidentified.discard(link)
        self.peers[rank] = Peer(link, StateReport(State.JOINED))
        if all(peer.link is not None for peer in self.peers.values()):
            self._stop_listening()

    def _drop(self, link: Link) -> None:
        self._unidentified.discard(link)
        with suppress(KeyError, ValueError):
            self._selector.unregister(link.connection)
        link.close()

    def _excuse_silence(self, seconds: float) -> None:
        for peer in self.peers.values():
            if peer.link is not None:
                peer.link.heard += seconds

    def _beat(self) -> None:
        for peer in self.peers.values():
            if peer.link is not None:
                peer.link.send(BeatKind.BEAT, BEAT.pack(0, 0), self.generation)

    def _look(self) -> None:
        if self._noticed or self.on_loss is None:
            return
        if any(
            peer.gone or peer.report.state == State.LOST or self.is_silent(rank)
            for rank, peer in self.peers.items()
        ):
            self._noticed = True
            threading.Thread(target=self.on_loss, name="loss", daemon=True).start()

    def _close_links(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for link in [*self._unidentified, *(peer.link for peer in self.peers.values())]:
            if link is not None:
                link.close()
