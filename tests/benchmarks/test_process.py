"""A step's process: ended at its limit with all that it started, its output bounded."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import process
import pytest

SCRIPTS = Path(process.__file__).parent
HANG = "import time\ntime.sleep(1000)"


def run(tmp_path, code, limit_s=30.0):
    log = process.Log(tmp_path / "log")
    log.begin("a step")
    scratch = tmp_path / "scratch"
    command = [sys.executable, "-c", code]
    ended = process.run(command, limit_s, os.environ, log, tmp_path, scratch)
    return ended, (tmp_path / "log").read_text()


def is_running(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid):
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_process_returns_output_and_exit_status(tmp_path):
    code = "import sys; print('first'); print('last', file=sys.stderr); sys.exit(3)"
    ended, log = run(tmp_path, code)
    assert ended.status == 3 and {"first", "last"} <= set(log.split())
    assert run(tmp_path, "import os; os.abort()")[0].status == -signal.SIGABRT


def test_last_line_of_a_hung_process_is_reported(tmp_path):
    code = f"print('test_a PASSED')\nprint('test_b', end=' ', flush=True)\n{HANG}"
    ended, log = run(tmp_path, code, 1.5)
    assert ended.status is None and ended.seconds < 10
    assert ended.last_line == "test_b" and "KeyboardInterrupt" in log


HANG_IN = "import time; time.sleep(1000)"
DEAF = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)"
STUBBORN = f"""
{DEAF}
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {DEAF!r} + "\\n" + {HANG!r}])
print(child.pid, flush=True)
{HANG}
"""


def test_a_process_that_ignores_everything_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "INTERRUPT_S", 0.2)
    ended, _ = run(tmp_path, STUBBORN, 1.5)
    assert ended.status is None and wait_until_gone(int(ended.last_line))


def test_killed_call_leaves_no_process(tmp_path):
    """Not what the step started either: a profiler's program would keep the GPU."""
    inner = (
        "import os, subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']); "
        "print(child.pid, os.getpid(), flush=True); child.wait()"
    )
    code = f"""
import os, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import process
from pathlib import Path
log = process.Log(Path("log"))
log.begin("a step")
Path("scratch").mkdir()
process.run([sys.executable, "-c", {inner!r}], 1000, os.environ, log, Path("."), Path("scratch"))
"""
    outer = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    log = tmp_path / "log"
    deadline = time.monotonic() + 20
    while not (log.exists() and log.read_text().split()[-1].isdigit()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    grandchild, child = map(int, log.read_text().split()[-2:])
    assert is_running(child) and is_running(grandchild)
    outer.kill()
    outer.wait()
    assert wait_until_gone(child) and wait_until_gone(grandchild)
    deadline = time.monotonic() + 5
    while (tmp_path / "scratch").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (tmp_path / "scratch").exists()


def test_log_shows_where_a_process_hangs(tmp_path, monkeypatch):
    """In a call that Python cannot interrupt, as one into a driver is."""
    monkeypatch.setattr(process, "INTERRUPT_S", 0.2)
    code = (
        f"import faulthandler; faulthandler.enable()\n{DEAF}\ndef stuck():\n    {HANG_IN}\nstuck()"
    )
    ended, log = run(tmp_path, code, 1.5)
    assert ended.status is None and "Fatal Python error: Aborted" in log and "in stuck" in log


def test_a_log_of_many_calls_is_bounded(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"x" * (3 * process.LOG_BYTES) + b"the end")
    process.Log(path)
    assert path.stat().st_size == process.LOG_BYTES and path.read_bytes().endswith(b"the end")


@pytest.mark.parametrize("line", ["x" * 60, "x" * 100_000])
def test_long_log_keeps_head_and_tail(tmp_path, line):
    code = (
        f"print('head')\nfor i in range({20_000_000 // len(line)}): print('{line}')\nprint('tail')"
    )
    ended, log = run(tmp_path, code)
    assert ended.status == 0 and ended.last_line == "tail"
    assert "head" in log and log.rstrip().endswith("tail") and "bytes left out" in log
    assert len(log) < process.HEAD_BYTES + process.TAIL_BYTES + (1 << 17)
