"""A session in a real kernel: load, generate, interrupt, reload, fork, chat, shut down."""

import asyncio
import threading
import time

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SETUP = """
import os, sys, psutil, dist_int8
me, options = psutil.Process(), dict(max_tokens=200, progress=False, threads_per_stage=1)
def children(): return len(me.children())
model = None
"""
FORK = """
pid = os.fork()
if pid == 0:
    try:
        sys.exit(0)  # runs what the session registered for its end
    finally:
        os._exit(0)
assert os.waitpid(pid, 0)[0] == pid
assert model.generate("abc", max_new_tokens=6)[0].token_ids == expected
"""
CHAT = """
model.tokenizer.chat_template = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
)
answer = model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=4)[0]
assert answer.prompt == "<user>Hi"
assert answer.token_ids == model.generate("<user>Hi", max_new_tokens=4)[0].token_ids
"""
SHUTDOWN = """
stage = model._engine.pipeline.stage
import gc, weakref
gc.disable()
seen = weakref.ref(stage)
del stage
model.shutdown()
assert seen() is None and children() == before
"""


@pytest.fixture(scope="module")
def notebook():
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=240, kernel_name="python3")
    with client.setup_kernel():
        run(client, SETUP)
        yield client


def run(client: NotebookClient, code: str) -> None:
    """Runs a cell; CellExecutionError says what it raised."""
    cell = nbformat.v4.new_code_cell(code)
    client.nb.cells.append(cell)
    client.execute_cell(cell, len(client.nb.cells) - 1)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_session(notebook, tiny_llama, num_stages):
    load = f"model = dist_int8.load({str(tiny_llama)!r}, devices=['cpu'] * {num_stages}, **options)"
    run(notebook, "before = children()")
    run(notebook, load)
    run(notebook, "expected = model.generate('abc', max_new_tokens=6)[0].token_ids; expected")
    check_interrupts(notebook)
    run(notebook, load)  # the cell again: the first model goes
    run(notebook, f"assert children() == before + {num_stages - 1}, children()")
    run(notebook, "assert model.generate('abc', max_new_tokens=6)[0].token_ids == expected")
    run(notebook, FORK)
    run(notebook, CHAT)
    run(notebook, SHUTDOWN)


def check_interrupts(notebook):
    """The stop button, while tokens are generated; the next cell answers as before."""
    for seconds in (0.5, 0.8):

        def interrupt(seconds=seconds):
            time.sleep(seconds)  # the cell runs by then
            asyncio.run(notebook.km.interrupt_kernel())

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            run(notebook, "while True: model.generate('Once upon a time', max_new_tokens=150)")
        thread.join()
        run(notebook, "assert model.generate('abc', max_new_tokens=6)[0].token_ids == expected")
