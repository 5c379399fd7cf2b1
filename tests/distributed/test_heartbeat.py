"""Heartbeats over real sockets: progress, states, silence, goodbyes, and forged connections."""

import os
import socket
import time

import pytest

from dist_int8.distributed.heartbeat import BeatKind, Link, Pulse
from dist_int8.distributed.monitor import Monitor
from dist_int8.distributed.states import State, StateReport
from dist_int8.distributed.world import World
from dist_int8.errors import RankError, RankLostError, StageTimeoutError


@pytest.fixture
def monitor():
    monitor = Monitor(range(1, 3), "127.0.0.1", silence_s=2.0)
    yield monitor
    monitor.close()


@pytest.fixture
def pulse_of(monitor):
    pulses = []

    def pulse_of(rank, silence_s=60.0):
        seen = []
        pulse = Pulse(rank, monitor.address, 5.0, silence_s, seen.append, seen.append)
        pulses.append(pulse)
        wait_until(lambda: monitor.peers[rank].report.state == State.JOINED)
        return pulse, seen

    yield pulse_of
    for pulse in pulses:
        pulse.close()


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_progress_and_states_arrive(monitor, pulse_of):
    pulse, _ = pulse_of(2)
    pulse.received, pulse.done = 7, 6
    pulse.say(StateReport(State.READY), 0)
    peer = monitor.peers[2]
    wait_until(lambda: (peer.report.state, peer.received, peer.done) == (State.READY, 7, 6))
    assert monitor.peers[1].report == StateReport()
    pulse.say(StateReport(State.LOST, "rank 1, " + "x" * 5000), 0)
    wait_until(lambda: str(peer.report).startswith("lost: rank 1, x"))


def test_states_of_an_older_generation_do_not_count(monitor, pulse_of):
    pulse, seen = pulse_of(1)
    monitor.regroup({2})
    wait_until(lambda: seen == [1])
    pulse.say(StateReport(State.LOST, "rank 2"), 0)
    pulse.say(StateReport(State.JOINED), 1)
    wait_until(lambda: monitor.peers[1].report.state == State.JOINED)


def test_the_thread_sleeps_after_ranks_were_regrouped(monitor, pulse_of, monkeypatch):
    """One that does not would take a core, and Python's lock, from rank 0's stage."""
    pulse_of(1)
    looks = []
    look = monitor._look
    monkeypatch.setattr(monitor, "_look", lambda: looks.append(look()))
    for _ in range(3):
        monitor.regroup({2})
    pulse_of(2)
    time.sleep(0.5)
    assert 0 < len(looks) < 100


def test_a_closed_connection_is_told_from_a_goodbye(monitor, pulse_of):
    first, second = pulse_of(1)[0], pulse_of(2)[0]
    first.say_bye()
    first.close()
    second.close()
    wait_until(lambda: monitor.peers[1].ended and monitor.peers[2].gone)
    assert not monitor.peers[1].gone
    with pytest.raises(RankError, match="rank 2 ended") as raised:
        World(0, 3, monitor=monitor).wait_for("ready", 5.0)
    assert (raised.value.rank, raised.value.stage) == (2, 2)


def test_a_rank_notices_that_rank_0_is_gone(monitor, pulse_of):
    _, seen = pulse_of(1)
    monitor.close()
    wait_until(lambda: seen == ["rank 0 is gone"])


def test_silence_is_noticed_on_both_ends(monitor):
    """Of a connection whose other end does nothing, as behind a cut link."""
    host, port, token = monitor.address.split()
    with socket.create_connection((host, int(port))) as rank:
        Link(rank).send(BeatKind.HELLO, bytes.fromhex(token) + (1).to_bytes(4, "big"))
        world = World(0, 3, 2.0, monitor=monitor)
        with pytest.raises(RankLostError, match=r"rank 1 .*silent for 2 s \(step_timeout\)"):
            world.wait_for("ready", 20.0)
    with socket.create_server(("127.0.0.1", 0)) as rank_0:
        seen = []
        address = f"127.0.0.1 {rank_0.getsockname()[1]} {token}"
        pulse = Pulse(1, address, 5.0, 1.0, seen.append, seen.append)
        wait_until(lambda: seen and "rank 0 has been silent for 1 s" in seen[0])
        pulse.close()


@pytest.mark.parametrize(
    ("received", "done", "rank", "what"),
    [
        ({1: 5, 2: 4}, {1: 4, 2: 4}, 1, "rank 1 hangs"),
        ({1: 5, 2: 5}, {1: 5, 2: 4}, 2, "rank 2 hangs"),
        ({1: 5, 2: 4}, {1: 5, 2: 4}, 2, "rank 2 got no micro-batch"),
        ({1: 5, 2: 5}, {1: 5, 2: 5}, 2, "rank 2 sent a result"),
    ],
)
def test_the_stage_that_hangs_is_the_first_that_did_not_pass_the_step_on(
    monitor, received, done, rank, what
):
    for r, peer in monitor.peers.items():
        peer.received, peer.done = received[r], done[r]
    error = World(0, 3, 9.0, monitor=monitor).hung(step=5)
    assert isinstance(error, StageTimeoutError) and error.rank == rank
    assert str(error).startswith(what) and "after 9 s (step_timeout)" in str(error)


@pytest.mark.parametrize("forged", ["noise", "token", "rank", "size", "kind", "nothing"])
def test_unidentified_connections_are_closed_and_joined_ranks_stay(monitor, pulse_of, forged):
    pulse, _ = pulse_of(1)
    host, port, token = monitor.address.split()
    with socket.create_connection((host, int(port))) as connection:
        link = Link(connection)
        secret = bytes.fromhex(token)
        if forged == "noise":
            link.connection.send(os.urandom(500))
        elif forged == "token":
            link.send(BeatKind.HELLO, bytes(16) + (2).to_bytes(4, "big"))
        elif forged == "rank":  # that is here already
            link.send(BeatKind.HELLO, secret + (1).to_bytes(4, "big"))
        elif forged == "size":
            link.send(BeatKind.HELLO, secret + bytes(2000))
        elif forged == "kind":  # an order, after a proper start
            link.send(BeatKind.HELLO, secret + (2).to_bytes(4, "big"))
            link.send(BeatKind.REGROUP)
        if forged != "nothing":
            wait_until(lambda: link.receive() is None)
    pulse.say(StateReport(State.READY), 0)
    wait_until(lambda: monitor.peers[1].report.state == State.READY)
    assert monitor.peers[2].report == StateReport() or forged == "kind"
