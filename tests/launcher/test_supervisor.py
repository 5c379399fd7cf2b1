"""The supervisor of `dist-int8 launch`, with real processes: exit codes, signals, no orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_int8.launcher.supervisor import launch

NAMES = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GLOO_SOCKET_IFNAME"

# Each rank leaves its process id in FOLDER/RANK and then does what its arguments say.
RANK = """
import os, pathlib, signal, subprocess, sys, time
folder, action = pathlib.Path(sys.argv[1]), sys.argv[2:]
rank = int(os.environ["RANK"])

def leave(name, pid):
    (folder / f".{name}").write_text(str(pid))
    (folder / f".{name}").rename(folder / name)

if "stubborn" in action:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if "parent" in action:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    leave(f"child-{rank}", child.pid)
leave(str(rank), os.getpid())
while not (folder / "0").exists() or not (folder / "1").exists():
    time.sleep(0.01)
if "fail" in action and rank == 1:
    sys.exit(7)
if "die" in action and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if "end" not in action:
    time.sleep(600)
"""
SUPERVISOR = """
import sys
from dist_int8.launcher.supervisor import launch
sys.exit(launch(sys.argv[1:], 2, grace=1.0, drain=1.5))
"""


def is_running(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("[!.]*")]


@pytest.fixture
def start(tmp_path):
    """Starts a supervisor of two ranks in a process of its own and waits until both are up."""
    started = []

    def start(*action):
        rank = [sys.executable, "-c", RANK, str(tmp_path), *action]
        command = [sys.executable, "-c", SUPERVISOR, *rank]
        supervisor = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        started.append(supervisor)
        num_processes = 4 if "parent" in action else 2
        assert wait_until(lambda: len(pids(tmp_path)) == num_processes)
        return supervisor

    yield start
    for supervisor in started:
        supervisor.kill()
        supervisor.wait()
    for pid in pids(tmp_path):
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def test_environment_of_the_ranks(tmp_path):
    code = (
        "import os, pathlib; pathlib.Path(os.environ['OUT'], os.environ['RANK'])"
        f".write_text(' '.join(os.environ[name] for name in {NAMES.split()!r}))"
    )
    os.environ["OUT"] = str(tmp_path)
    try:
        assert launch([sys.executable, "-c", code], 3) == 0
    finally:
        del os.environ["OUT"]
    lines = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    (port,) = {line.pop(5) for line in lines}
    assert 1024 <= int(port) <= 65535
    assert lines == [[str(r), str(r), "3", "3", "127.0.0.1", "lo"] for r in range(3)]


def test_the_exit_code_is_0_when_every_rank_succeeds(start):
    supervisor = start("end")
    assert supervisor.wait(20) == 0
    assert supervisor.stderr.read() == ""


@pytest.mark.parametrize(
    ("action", "code", "said"),
    [("fail", 7, "rank 1 failed (7)"), ("die", 137, "rank 1 was killed by SIGKILL")],
)
def test_a_failed_rank_ends_the_others(start, tmp_path, action, code, said):
    supervisor = start(action)
    assert supervisor.wait(20) == code
    assert f"launch: {said}; ending the other 1" in supervisor.stderr.read()
    assert not any(map(is_running, pids(tmp_path)))


def test_a_rank_that_ignores_term_is_killed(start, tmp_path):
    supervisor = start("fail", "stubborn")
    assert supervisor.wait(20) == 7
    assert not any(map(is_running, pids(tmp_path)))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("action", ["", "stubborn"])
def test_signals_are_passed_on(start, tmp_path, signum, action):
    supervisor = start(action)
    supervisor.send_signal(signum)
    assert supervisor.wait(20) == 128 + signum
    assert not any(map(is_running, pids(tmp_path)))


def test_children_of_the_ranks_end_with_them(start, tmp_path):
    supervisor = start("parent")
    supervisor.terminate()
    assert supervisor.wait(20) == 128 + signal.SIGTERM
    assert wait_until(lambda: not any(map(is_running, pids(tmp_path))), 5)


def test_no_orphans_when_the_supervisor_is_killed(start, tmp_path):
    supervisor = start("stubborn")
    supervisor.kill()
    assert wait_until(lambda: not any(map(is_running, pids(tmp_path))), 5)
