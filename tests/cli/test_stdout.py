"""Taking stdout: what libraries print meanwhile goes to stderr."""

import os

import pytest

from dist_int8.cli.stdout import take_stdout


def test_only_what_is_asked_for_goes_to_stdout(capfd):
    with take_stdout() as stdout:
        stdout.write("answer, Größe\n")
        os.write(1, b"a library\n")
    print("after", flush=True)
    captured = capfd.readouterr()
    assert captured.out == "answer, Größe\nafter\n" and captured.err == "a library\n"


def test_stdout_is_given_back_after_an_error(capfd):
    with pytest.raises(RuntimeError), take_stdout():
        raise RuntimeError
    print("after", flush=True)
    assert capfd.readouterr().out == "after\n"


def test_a_closed_stdout_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(OSError, match=r"^stdout is closed; redirect it"), take_stdout():
        pass
