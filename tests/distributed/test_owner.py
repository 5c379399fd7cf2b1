"""Forked children: they end nothing of their parent, keep nothing open, and load for themselves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_int8.distributed.owner import Owner

LOAD = """
import os, signal, sys, threading, time
import dist_int8
model = dist_int8.load(sys.argv[1], max_tokens=64, progress=False, **eval(sys.argv[2]))
before = model.generate([[1, 2]], max_new_tokens=8)[0].token_ids
"""
# How a child begins and ends; each must leave the parent's model as it was.
CHILDREN = {
    "leaves by sys.exit": "if os.fork() == 0: sys.exit(0)",
    "shuts down": "if os.fork() == 0: model.shutdown(); model.drain(); os._exit(0)",
    "leaves the context": "if os.fork() == 0:\n    with model: pass\n    sys.exit(0)",
    "drops the handle": "if os.fork() == 0: del model; import gc; gc.collect(); sys.exit(0)",
    "leaves a stream": """
stream = model.generate([[1, 2]], max_new_tokens=50, stream=True)
next(stream)
if os.fork() == 0:
    del stream
    sys.exit(0)
stream.close()
""",
    "of multiprocessing": """
import multiprocessing
child = multiprocessing.get_context("fork").Process(target=model.shutdown)
child.start(); child.join(); assert child.exitcode == 0
if os.fork() == 0: os._exit(0)
""",
    "of torch's data loader": """
import torch
loader = torch.utils.data.DataLoader(list(range(4)), num_workers=1)
assert len(list(loader)) == 4
if os.fork() == 0: os._exit(0)
""",
    "asks for tokens": """
if os.fork() == 0:
    asked = [lambda: model.generate("a"), lambda: model.logits([[1]]),
             lambda: next(model.generate("a", stream=True))]
    for ask in asked:
        try:
            ask()
        except RuntimeError as error:
            assert type(error) is RuntimeError, error
            assert "forked process must load its own model" in str(error)
        else:
            os._exit(3)
    sys.exit(0)
""",
}
AFTER = """
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
time.sleep(1.0)  # for a closed connection to be noticed
assert model.generate([[1, 2]], max_new_tokens=8)[0].token_ids == before
print("still answers")
model.shutdown()
"""
TWO, THREADS = (
    "{'devices': ['cpu', 'cpu']}",
    "{'devices': ['cpu', 'cpu'], 'in_process': True}",
)


def run(code, *arguments, timeout=90):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def test_an_owner_is_the_process_that_made_it():
    owner = Owner()
    assert owner.is_here
    child = os.fork()
    if child == 0:
        os._exit(5 if owner.is_here else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    owner.check()


@pytest.mark.parametrize("kind", [TWO, THREADS], ids=["two", "threads"])
def test_a_forked_child_leaves_the_model_as_it_was(tiny_llama, kind):
    steps = "".join(
        child + "\n" + AFTER.replace("model.shutdown()\n", "") for child in CHILDREN.values()
    )
    answer = run(LOAD + steps, tiny_llama, kind)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == ["still answers"] * len(CHILDREN), answer.stdout
    assert "Traceback" not in answer.stderr and "Exception ignored" not in answer.stderr


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_forked_child_does_not_keep_the_ranks_of_a_killed_parent(tiny_llama):
    """Loaded in a thread that ended, so that the kernel's signal is not what ends the rank."""
    code = """
import os, sys, threading, time
import dist_int8
made = []
load = lambda: made.append(
    dist_int8.load(sys.argv[1], max_tokens=64, progress=False, devices=["cpu", "cpu"]))
thread = threading.Thread(target=load)
thread.start(); thread.join()
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, made[0]._engine.pipeline.world.children[1].pid, flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", code, str(tiny_llama)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        child, rank = map(int, parent.stdout.readline().split())
        try:
            parent.kill()
            deadline = time.monotonic() + 10
            while is_running(rank) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not is_running(rank) and is_running(child)
        finally:
            os.kill(child, signal.SIGKILL)
