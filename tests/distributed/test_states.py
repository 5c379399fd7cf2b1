"""What a rank says of itself, as it travels."""

import pytest

from dist_int8.distributed.states import State, StateReport
from dist_int8.errors import ProtocolError, RankError


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (StateReport(), ""),
        (StateReport(State.JOINED), "joined"),
        (StateReport(State.READY), "ready"),
        (StateReport(State.FAILED, "stages: 3: too many"), "failed: stages: 3: too many"),
        (StateReport(State.FAILED, "a: b", ValueError), "failed ValueError: a: b"),
        (StateReport(State.LOST, "rank 2"), "lost: rank 2"),
    ],
)
def test_a_report_comes_back_as_it_was(report, text):
    assert report.pack() == text and StateReport.parse(text) == report


@pytest.mark.parametrize(
    "text", ["well", "ready ", "READY", "dead: why", "failed SystemExit: why", "failed str: why"]
)
def test_a_state_that_no_rank_has_is_refused(text):
    with pytest.raises(ProtocolError, match="is no state of a rank"):
        StateReport.parse(text)


@pytest.mark.parametrize(
    ("error", "report"),
    [
        (ValueError("a\nb"), StateReport(State.FAILED, "a b", ValueError)),
        (UnicodeError("cut"), StateReport(State.FAILED, "cut", ValueError)),
        (MemoryError(), StateReport(State.FAILED, "MemoryError", MemoryError)),
        (FileNotFoundError("gone"), StateReport(State.FAILED, "gone", FileNotFoundError)),
        (PermissionError("no"), StateReport(State.FAILED, "no", OSError)),
        (KeyError("x"), StateReport(State.FAILED, "KeyError: 'x'")),
        (AssertionError(), StateReport(State.FAILED, "AssertionError")),
        (RankError("rank 2", 2), StateReport(State.LOST, "rank 2")),
    ],
)
def test_an_error_becomes_a_report(error, report):
    assert StateReport.of_error(error) == report
    assert str(report).startswith(report.state.value + ": ")
