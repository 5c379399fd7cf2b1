"""What a rank says of itself, as it travels."""

import pytest

from dist_int8.distributed.states import State, StateReport
from dist_int8.errors import ProtocolError


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (StateReport(), ""),
        (StateReport(State.JOINED), "joined"),
        (StateReport(State.READY), "ready"),
        (StateReport(State.FAILED, "stages: 3: too many"), "failed: stages: 3: too many"),
        (StateReport(State.LOST, "rank 2"), "lost: rank 2"),
    ],
)
def test_a_report_comes_back_as_it_was(report, text):
    assert str(report) == text and StateReport.parse(text) == report


@pytest.mark.parametrize("text", ["well", "ready ", "READY", "dead: why"])
def test_a_state_that_no_rank_has_is_refused(text):
    with pytest.raises(ProtocolError, match="is no state of a rank"):
        StateReport.parse(text)
