"""Launchers that are told to end, or killed: no rank and no process between is left."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
# Answers for ever, and says so once.
ANSWER = """
import sys, dist_int8
with dist_int8.load(sys.argv[1], devices=["cpu"] * 2, threads_per_stage=1, progress=False) as model:
    model.generate([[1, 2]], max_new_tokens=2)
    print("answered", flush=True)
    while True:
        model.generate([[1, 2]], max_new_tokens=100)
"""
LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", "29551"],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "29552"],
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"],
    "dist-int8": ["dist-int8", "launch", "--stages", "2"],
}


def below(pid: int) -> list[int]:
    """Every process below one."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *below(int(child))]
    return found


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("launcher", "signum"),
    [(launcher, signal.SIGKILL) for launcher in LAUNCHERS]  # the others pass on what they can
    + [("deepspeed", signal.SIGTERM), ("deepspeed", signal.SIGINT)],
)
def test_nothing_is_left_when_a_launcher_ends(tiny_llama, tmp_path, launcher, signum):
    """The launcher's own process gets the signal, as from `kill` or a service manager."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    script = tmp_path / "answer.py"
    script.write_text(ANSWER)
    command, *flags = LAUNCHERS[launcher]
    pipeline = subprocess.Popen(
        [BIN / command, *flags, script, tiny_llama],
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    processes = []
    try:
        assert any(b"answered" in line for line in pipeline.stdout)
        processes = below(pipeline.pid)
        ranks = [pid for pid in processes if str(script) in command_of(pid)[1:3]]
        assert len(ranks) == 2
        pipeline.send_signal(signum)
        ended = time.monotonic()
        # deepspeed and torchrun give their ranks time to end by themselves
        while any(map(is_running, processes)) and time.monotonic() - ended < 45:
            pipeline.poll()
            time.sleep(0.1)
        assert not any(map(is_running, processes))
        if signum == signal.SIGKILL:
            assert time.monotonic() - ended < 10
    finally:
        for pid in [pipeline.pid, *filter(is_running, processes)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        pipeline.wait()
        pipeline.stdout.close()
