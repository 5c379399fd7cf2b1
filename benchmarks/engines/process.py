"""The driver's side of an engine: its process, asked one cell at a time and ended at a limit."""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")


class EngineProcess:
    """An engine that stays loaded, and is stopped while it is not asked: some spin when idle.

    Args:
        command: what starts its script.
        log: file that its own output is appended to.

    Attributes:
        loaded: version, weight_bytes and load_s; or error.
    """

    def __init__(self, command: Sequence[str], log: Path, limit_s: float) -> None:
        self._log = log
        self._left, self._has_ended = b"", False
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            )
        try:
            self.loaded = self._answer(limit_s)
        except BaseException:  # an interrupted driver has no handle of it yet
            self.end()
            raise
        if "error" in self.loaded:
            self.end()

    @property
    def is_alive(self) -> bool:
        return not self._has_ended

    def ask(self, cell: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Returns the engine's answer, or {"error": ...}; after a limit the engine is ended."""
        assert self._process.stdin is not None
        if self._has_ended:
            return {"error": "the engine has ended"}
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(cell).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            return self._died(str(error))
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._left:
                if not selector.select(limit_s):
                    self.end()
                    return {"error": f"no answer within {limit_s:.0f} s"}
                read = os.read(self._process.stdout.fileno(), 1 << 16)
                if not read:
                    return self._died("")
                self._left += read
        line, self._left = self._left.split(b"\n", 1)
        self._signal(signal.SIGSTOP)
        return json.loads(line)

    def _signal(self, number: int) -> None:
        """Signals the engine and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _died(self, why: str) -> dict[str, Any]:
        self.end()
        tail = self._log.read_bytes()[-400:].decode(errors="replace").strip().splitlines()
        last = tail[-1] if tail else why
        return {"error": f"ended with status {self._process.returncode}: {last}"}

    def resident_bytes(self) -> int:
        """Resident memory of the engine's processes, shared pages once per process."""
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == self._process.pid:  # the session that was started for it
                    total += int(fields[21]) * PAGE
            except (OSError, IndexError, ValueError):
                continue  # ended meanwhile
        return total

    def end(self) -> None:
        """Kills the engine and all that it started, and waits for it."""
        if self._has_ended:
            return  # its process id may belong to another by now
        self._has_ended = True
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not written yet has no reader
                    pipe.close()


class Neighbours:
    """Processes that each keep a core busy while the `with` block runs.

    Args:
        count: how many.
        pinned: keep neighbour i on the i-th core of this process instead of letting it wander.
    """

    def __init__(self, count: int, pinned: bool = False) -> None:
        self._count, self._pinned = count, pinned
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Neighbours":
        cores = sorted(os.sched_getaffinity(0))
        for i in range(self._count):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            self._processes.append(process)
            if self._pinned:
                os.sched_setaffinity(process.pid, {cores[i % len(cores)]})
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
