"""Progress of an evaluation: lines where stderr is no terminal, a bar where it is one."""

import pytest

from dist_int8.evaluation import progress
from dist_int8.evaluation.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_now_and_then(clock, capsys):
    with Progress(200, "token", True) as bar:
        bar.start("loading")
        bar.add(50)
        clock[0] += progress.SECONDS_BETWEEN_LINES - 1
        bar.start("too soon")
        clock[0] += 1
        bar.add(50)
        bar.start("ours")
    assert capsys.readouterr().err.splitlines() == [
        "eval: 0% done, loading, 0 s so far",
        "eval: 50% done, ours, 10 s so far",
    ]


def test_a_terminal_gets_a_bar_and_no_lines(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(200, "token", True) as bar:
        bar.start("ours")
        bar.add(200)
    shown = capsys.readouterr().err
    assert "ours" in shown and "/200" in shown and "so far" not in shown


def test_nothing_is_shown_unless_asked(capsys):
    with Progress(200, "token", False) as bar:
        bar.start("ours")
        bar.add(200)
    assert capsys.readouterr().err == ""
