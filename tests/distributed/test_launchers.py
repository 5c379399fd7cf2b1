"""Which ancestors are launchers, and that a rank ends with them but not with its shell."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_int8.distributed import launchers

PYTHON = "/venv/bin/python3.11"
# Leaves its process id in argv[1] and waits for its launchers to end.
RANK = """
import os, pathlib, sys, time
from dist_int8.distributed.launchers import end_with_launchers, find_launchers
os.environ.setdefault("RANK", "0")
end_with_launchers()
end_with_launchers()
file = pathlib.Path(sys.argv[1])
names = " ".join(launcher.name for launcher in find_launchers())
file.with_suffix(".new").write_text(f"{os.getpid()} {names}")
file.with_suffix(".new").rename(file)
time.sleep(600)
"""
# A launcher by its command line: starts its arguments and waits.
STARTER = "import subprocess, sys; subprocess.run(sys.argv[1:])"


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter between open and read
        return False


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ([PYTHON, "/venv/bin/deepspeed", "--num_gpus", "2", "x.py"], "deepspeed"),
        ([PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "x.py"], "deepspeed"),
        (["python", "/venv/bin/torchrun", "--nproc-per-node", "2", "x.py"], "torchrun"),
        (["python3", "-W", "ignore", "-m", "torch.distributed.run", "x.py"], "torchrun"),
        ([PYTHON, "/venv/bin/accelerate", "launch", "x.py"], "accelerate"),
        ([PYTHON, "/venv/bin/accelerate-launch", "x.py"], "accelerate"),
        (
            [PYTHON, "/venv/bin/dist-int8", "launch", "--stages", "2", "generate"],
            "dist-int8 launch",
        ),
        ([PYTHON, "-m", "dist_int8", "launch", "--stages", "2", "x"], "dist-int8 launch"),
        ([PYTHON, "/venv/bin/dist-int8", "generate"], None),
        (["slurmstepd: [71.0]"], "srun"),
        (["mpirun", "-n", "2", "python", "x.py"], "mpirun"),
        (["/usr/bin/orted"], "mpirun"),
        (["bash", "-c", "torchrun x.py"], None),
        (["/bin/sh", "./torchrun"], None),
        ([PYTHON, "-c", "import deepspeed"], None),
        ([PYTHON, "train.py", "torchrun"], None),
        ([PYTHON, "-m"], None),
        ([PYTHON], None),
        (["vim", "/venv/bin/torchrun"], None),
        ([], None),
    ],
)
def test_launchers_are_known_by_their_command(command, name):
    assert launchers.name_launcher(command) == name


@pytest.fixture
def rank(tmp_path):
    """The command of a rank and the file in which it leaves its process id."""
    script, file = tmp_path / "rank.py", tmp_path / "rank"
    script.write_text(RANK)
    yield [sys.executable, str(script), str(file)], file
    if file.exists():
        pid = int(file.read_text().split()[0])
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("between", [[], ["bash", "-c", '"$@"; true', "bash"]], ids=["", "shell"])
def test_a_rank_ends_with_the_launcher_of_its_launcher(tmp_path, rank, between):
    """The command dies and leaves the process that started the rank, as deepspeed's does."""
    command, file = rank
    for name in ("deepspeed", "torchrun"):
        (tmp_path / name).write_text(STARTER)
    outer = [sys.executable, str(tmp_path / "deepspeed")]
    inner = [sys.executable, str(tmp_path / "torchrun")]
    launcher = subprocess.Popen([*outer, *inner, *between, *command], stderr=subprocess.PIPE)
    wait_until(file.exists)
    pid, *names = file.read_text().split()
    assert names == ["torchrun", "deepspeed"]
    launcher.kill()
    wait_until(lambda: not is_running(int(pid)), 5)
    assert b"[rank 0] deepspeed" in launcher.communicate()[1]


def test_a_rank_that_is_stopped_ends_with_its_launcher(tmp_path, rank):
    command, file = rank
    (tmp_path / "torchrun").write_text(STARTER)
    launcher = subprocess.Popen([sys.executable, str(tmp_path / "torchrun"), *command])
    wait_until(file.exists)
    pid = int(file.read_text().split()[0])
    os.kill(pid, signal.SIGSTOP)
    launcher.kill()
    wait_until(lambda: not is_running(pid), 5)
    launcher.wait()


def test_a_rank_does_not_end_with_the_shell_that_started_it(rank):
    command, file = rank
    shell = subprocess.Popen(["bash", "-c", '"$@" & disown; sleep 600', "bash", *command])
    wait_until(file.exists)
    shell.kill()
    shell.wait()
    time.sleep(3 * launchers.POLL_S)
    assert is_running(int(file.read_text().split()[0]))


def test_a_later_process_of_the_same_number_is_not_the_launcher():
    child = subprocess.Popen(["sleep", "600"])
    started = launchers._read_stat(child.pid).started
    assert launchers.Launcher("x", child.pid, started).lives
    assert not launchers.Launcher("x", child.pid, started - 1).lives
    child.kill()
    wait_until(lambda: not launchers.Launcher("x", child.pid, started).lives)  # a zombie
    child.wait()
    assert not launchers.Launcher("x", child.pid, started).lives
