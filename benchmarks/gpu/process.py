"""One step's process: run under a limit, its output kept in a log, ended whatever it does."""

import os
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 160 << 10  # of a step's output that the log keeps from its beginning
TAIL_BYTES = 32 << 10  # and from its end
INTERRUPT_S = 3.0  # for a process to end by itself after SIGINT: pytest then says what failed
ABORT_S = 2.0  # and after SIGABRT: faulthandler then says where it hangs
KILL_S = 5.0  # for the kernel to take a killed process away; one inside the driver may stay
LOG_BYTES = 1 << 20  # of earlier calls that a log goes on with


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status, negative for a signal; None if it had to be ended.
        seconds: how long it ran.
        last_line: the last line that it printed, before it was ended: where it hung.
    """

    status: int | None
    seconds: float
    last_line: str


class Log:
    """A log file that many steps append to, a bounded number of bytes each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.write_bytes(path.read_bytes()[-LOG_BYTES:])
        self._kept = 0
        self._tail: deque[bytes] = deque()
        self._left_out = self._tail_bytes = 0
        self._end = b""

    def begin(self, title: str) -> None:
        self._kept = self._left_out = self._tail_bytes = 0
        self._tail.clear()
        self._end = b""
        self._append(f"\n==== {title}\n".encode())

    def write(self, output: bytes) -> None:
        """Keeps the head at once, what comes after it until newer output takes its place."""
        self._end = (self._end + output)[-4096:]
        room = max(0, HEAD_BYTES - self._kept)
        if output[:room]:
            self._append(output[:room])
            self._kept += len(output[:room])
        if output[room:]:
            self._tail.append(output[room:])
            self._tail_bytes += len(output[room:])
        while self._tail and self._tail_bytes - len(self._tail[0]) >= TAIL_BYTES:
            dropped = len(self._tail.popleft())
            self._tail_bytes -= dropped
            self._left_out += dropped

    def end(self) -> None:
        """Appends the tail of the step."""
        if self._left_out:
            self._append(f"\n[... {self._left_out} bytes left out ...]\n".encode())
        if self._tail:
            self._append(b"".join(self._tail))

    def last_line(self) -> str:
        """The last line of the step that says something."""
        lines = self._end.decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _append(self, output: bytes) -> None:
        with open(self.path, "ab") as file:
            file.write(output)


def run(
    command: Sequence[str],
    limit_s: float,
    environment: Mapping[str, str],
    log: Log,
    folder: Path,
    scratch: Path,
) -> Ended:
    """Runs a command until it ends or limit_s is over; then it and what it started are ended.

    It shares this process's session but has a process group of its own, which ends with this
    process however that ends.

    Args:
        command, environment, folder: of the process.
        limit_s: seconds.
        log: what it prints goes there.
        scratch: a folder that is removed where this process is killed.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        cwd=folder,
        process_group=0,
    )
    guardian = _guard(process.pid, scratch)
    reader = threading.Thread(target=_copy, args=(process, log), daemon=True)
    reader.start()
    status: int | None
    try:
        status, hung_at = process.wait(limit_s), ""
    except subprocess.TimeoutExpired:
        status, hung_at = None, log.last_line()
    finally:  # also where this process is interrupted
        _end(process)
        guardian.kill()
        guardian.communicate()
        reader.join(KILL_S)  # a grandchild that survived may hold the pipe
        log.end()
    return Ended(status, time.monotonic() - started, hung_at or log.last_line())


def _guard(group: int, scratch: Path) -> subprocess.Popen[bytes]:
    """Waits for the end of this process, whose pipe closes then, and kills the process group."""
    clean_up = f"cat > /dev/null; kill -9 -{group}; rm -rf {shlex.quote(str(scratch))}"
    return subprocess.Popen(
        ["/bin/sh", "-c", clean_up],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )


def _copy(process: subprocess.Popen[bytes], log: Log) -> None:
    assert process.stdout is not None
    with suppress(ValueError, OSError):
        while output := os.read(process.stdout.fileno(), 1 << 16):
            log.write(output)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and its group, first politely."""
    signs = {signal.SIGINT: INTERRUPT_S, signal.SIGABRT: ABORT_S, signal.SIGKILL: KILL_S}
    for sign, patience_s in signs.items():
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)
    with suppress(ProcessLookupError, PermissionError):  # what it left running
        os.killpg(process.pid, signal.SIGKILL)
