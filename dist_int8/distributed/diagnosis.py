"""Which rank failed, and why, from heartbeats and the processes that rank 0 started."""

from __future__ import annotations

from dist_int8.distributed.children import Children
from dist_int8.distributed.monitor import Monitor
from dist_int8.distributed.states import State
from dist_int8.errors import RankError, RankLostError, StageTimeoutError


def find_cause(monitor: Monitor, children: Children, with_victims: bool = True) -> RankError | None:
    """Returns the error of the rank that failed, with its reason; None while all is well.

    Args:
        monitor: of the heartbeats.
        children: processes that this one started.
        with_victims: also take a rank that only lost a neighbour.
    """
    return (
        _find_killed(children)
        or _find_failed(monitor)
        or _find_gone(monitor, children, with_victims)
    )


def find_original(error: RankError) -> Exception:
    """The error as its rank raised it, where that is one of bad input or of this machine."""
    return error if error.kind is None else error.kind(str(error))


def _find_killed(children: Children) -> RankError | None:
    for rank, child in children.items():
        end = children.describe_end(rank)
        if end is not None and child.returncode < 0:
            return RankError(f"rank {rank} (process {child.pid}) {end}", rank)
    return None


def _find_failed(monitor: Monitor) -> RankError | None:
    for rank, peer in monitor.peers.items():
        if peer.report.state == State.FAILED:
            return RankError(f"rank {rank} {peer.report}", rank, peer.report.kind)
    return None


def _find_gone(monitor: Monitor, children: Children, with_victims: bool) -> RankError | None:
    for rank, peer in sorted(monitor.peers.items(), key=lambda item: item[1].ended):
        if peer.report.state == State.LOST:
            if with_victims:
                return RankError(f"rank {rank} {peer.report}", rank)
        elif peer.gone or peer.ended or children.describe_end(rank) is not None:
            return _describe_end(rank, children)
        elif monitor.is_silent(rank):
            return RankLostError(
                f"rank {rank} has been silent for {monitor.silence_s:g} s (step_timeout): it "
                "was stopped, or the link to it was cut",
                rank,
            )
    return None


def _describe_end(rank: int, children: Children) -> RankError:
    """Describes the end of a rank that gave no reason."""
    child = children.get(rank)
    if child is None:
        return RankError(f"rank {rank} ended: it closed its connections", rank)
    end = children.await_end(rank)
    report = children.read_report(rank)
    if report is not None:
        return RankError(f"rank {rank} {report}", rank, report.kind)
    end = end or "closed its connections"
    return RankError(f"rank {rank} (process {child.pid}) {end}", rank)


def find_lost(monitor: Monitor, children: Children, error: RankError) -> set[int]:
    """The started ranks that cannot go on: those that ended, and the one that an error names.

    A rank that only lost a neighbour can go on. All of them where it cannot be told.
    """
    ended = {
        rank
        for rank, peer in monitor.peers.items()
        if peer.gone
        or peer.ended
        or peer.report.state == State.FAILED
        or monitor.is_silent(rank)
        or children[rank].poll() is not None
    }
    if error.rank and monitor.peers[error.rank].report.state != State.LOST:
        ended.add(error.rank)
    return ended or set(monitor.peers)


def find_hung(monitor: Monitor | None, step: int, limit_s: float) -> StageTimeoutError:
    """The stage that holds up micro-batch `step`, by what the last heartbeats said."""
    limit = f"after {limit_s:g} s (step_timeout)"
    if monitor is None:  # all stages are in this process
        return StageTimeoutError(f"a stage hangs: no result {limit}")
    for rank, peer in monitor.peers.items():
        if peer.done < step:
            where = "hangs" if peer.received >= step else "got no micro-batch and hangs"
            return StageTimeoutError(f"rank {rank} {where}: no result {limit}", rank)
    last = max(monitor.peers)
    return StageTimeoutError(f"rank {last} sent a result that did not come {limit}", last)
