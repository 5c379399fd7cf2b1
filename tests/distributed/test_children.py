"""Processes of ours: how they ended, and that none stays."""

import signal
import subprocess
import sys

import pytest

from dist_int8.distributed.children import Children


@pytest.fixture
def children(tmp_path):
    """Rank 1 ends with exit code 3, rank 2 runs until it is killed."""
    made = Children()
    made.folder = tmp_path / "meeting"
    made.folder.mkdir()
    for rank, code in ((1, "exit(3)"), (2, "import time; time.sleep(600)")):
        command = [sys.executable, "-c", code]
        made[rank] = subprocess.Popen(command, stdin=subprocess.PIPE)
    yield made
    made.end_all(0.0)


def test_the_end_of_a_child_is_described(children):
    children[1].wait()
    assert children.describe_end(1) == "ended with exit code 3"
    assert children.describe_end(2) is None and children.await_end(2) is None
    assert children.describe_end(7) is None
    children[2].send_signal(signal.SIGTERM)
    assert children.await_end(2) == "died with signal SIGTERM"


def test_end_all_leaves_no_child_and_no_folder(children):
    folder, processes = children.folder, list(children.values())
    children.end_all(0.2)  # one of them does not end by itself
    assert not children and not folder.exists() and children.folder is None
    assert [process.returncode for process in processes] == [3, -signal.SIGKILL]
    children.end_all(0.2)
