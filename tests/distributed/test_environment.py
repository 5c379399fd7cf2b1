"""What a launcher said, or nobody did."""

import pytest

from dist_int8.distributed import environment


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be 0 to WORLD_SIZE - 1 = 1, got 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be an integer, got 'x'"),
    ],
)
def test_a_broken_launcher_environment_is_named(monkeypatch, given, message):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        environment.find_launched()


def test_a_plain_session_is_not_launched(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert environment.find_launched() is None
