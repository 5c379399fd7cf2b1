"""What a rank says of itself, as it travels."""

import pytest

from dist_int8.distributed.states import Report, State
from dist_int8.errors import ProtocolError


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (Report(), ""),
        (Report(State.JOINED), "joined"),
        (Report(State.READY), "ready"),
        (Report(State.FAILED, "stages: 3: too many"), "failed: stages: 3: too many"),
        (Report(State.LOST, "rank 2"), "lost: rank 2"),
    ],
)
def test_a_report_comes_back_as_it_was(report, text):
    assert str(report) == text and Report.parse(text) == report


@pytest.mark.parametrize("text", ["well", "ready ", "READY", "dead: why"])
def test_a_state_that_no_rank_has_is_refused(text):
    with pytest.raises(ProtocolError, match="is no state of a rank"):
        Report.parse(text)
