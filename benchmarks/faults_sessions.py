"""Sessions in processes of their own, hit from outside, and what is killed at random."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from faults_driver import OPTIONS

GONE_S = 10.0
STAGES = 3
DRIVER = Path(__file__).with_name("faults_driver.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def is_running(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def num_left(pids: list[int]) -> int:
    """Processes that still run after GONE_S."""
    deadline = time.monotonic() + GONE_S
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return sum(map(is_running, pids))


class Session:
    """A driver in a process of its own, and what it said last."""

    def __init__(self, model: str, idle: bool = False, **options) -> None:
        given = {"model": model, "stages": STAGES, "idle": idle, "options": OPTIONS | options}
        self.state: dict = {}
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.wait(lambda: "ready" in self.state, 120)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.state = self.state | json.loads(line)

    def wait(self, condition, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    @property
    def ranks(self) -> list[int]:
        return list(self.state["ranks"].values())

    def end(self) -> int:
        """Ends the session; the processes left."""
        pids = [self.process.pid, *self.ranks]
        self.process.kill()
        self.process.wait()
        return num_left(pids)


def random_kills(model_folder: str, num_kills: int, seed: int) -> dict:
    """Kills a random rank, now and then rank 0, at random moments; every answer must be right."""
    rng = random.Random(seed)
    options = {"recover": True, "max_recoveries": 3 * num_kills}
    session = Session(model_folder, **options)
    counts = {"ranks": 0, "drivers": 0, "answers": 0, "hangs": 0, "left": 0, "wrong": 0}
    seconds = []
    for kill in range(num_kills):
        time.sleep(rng.random() * 0.8)
        if rng.random() < 0.1:
            counts["drivers"] += 1
            counts["answers"] += session.state["answers"]
            started = time.monotonic()
            counts["left"] += session.end()
            seconds.append(time.monotonic() - started)
            session = Session(model_folder, **options)
        else:
            counts["ranks"] += 1
            rank = str(rng.randrange(1, STAGES))
            pid, answers = session.state["ranks"][rank], session.state["answers"]
            started = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            # an answer that came to an end after the kill, and the rank is another
            if not session.wait(
                lambda s=session, a=answers, r=rank, p=pid: (
                    s.state["answers"] > a and s.state["ranks"].get(r, p) != p
                ),
                90,
            ):
                counts["hangs"] += 1
                counts["left"] += session.end()
                session = Session(model_folder, **options)
            seconds.append(time.monotonic() - started)
        counts["wrong"] += not session.state["equal"]
        print(f"kill {kill + 1}: {seconds[-1]:.1f} s {counts}", flush=True)
    counts["answers"] += session.state["answers"]
    counts["left"] += session.end()
    return {"kills": num_kills, "seed": seed, **counts, "slowest_s": max(seconds)}
