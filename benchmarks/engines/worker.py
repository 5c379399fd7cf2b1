"""An engine's side of a measurement: one process, in the engine's own environment.

`serve` loads the engine, then answers one JSON line per cell on its standard input. Whatever the
engine prints goes to standard error. Needs nothing but Python.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

MOST_SEQUENCES = 32
MOST_TOKENS = 2048 + 128  # of a prompt and its answer


class Stopwatch:
    """Times one call: prefill until every prompt has its first token, decode from there on."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self._num_prompt_tokens = sum(map(len, prompts))
        self._waiting = set(range(len(prompts)))
        self._num_early = 0
        self.begin()

    def begin(self) -> None:
        """Starts the clock again."""
        self._started = self._prefilled = self._ended = time.perf_counter()

    def note(self, index: int, token_id: int) -> None:
        """Records that a token of prompt `index` is known."""
        self._ended = time.perf_counter()
        self.token_ids[index].append(token_id)
        if index in self._waiting:
            self._waiting.discard(index)
            self._prefilled, self._num_early = self._ended, self._count()

    def note_all(self, token_ids: list[int]) -> None:
        """Records one token per prompt."""
        for index, token_id in enumerate(token_ids):
            self.note(index, token_id)

    def _count(self) -> int:
        return sum(map(len, self.token_ids))

    def figures(self) -> dict[str, float]:
        """Tokens per second of prefill and of decode (nothing after the first: 0), and seconds."""
        assert not self._waiting, f"no token for prompts {sorted(self._waiting)}"
        decode_s = self._ended - self._prefilled
        return {
            "prefill": self._num_prompt_tokens / (self._prefilled - self._started),
            "decode": (self._count() - self._num_early) / decode_s if decode_s else 0.0,
            "seconds": self._ended - self._started,
        }


class Engine(Protocol):
    """What a script of an engine gives to `serve`."""

    version: str
    weight_bytes: int  # of the weights as they are kept, a shared table once

    def generate(self, prompts: list[list[int]], num_tokens: int, watch: Stopwatch) -> None:
        """Answers all prompts as one batch, greedily, past any end token."""


def answer(engine: Engine, cell: dict[str, Any]) -> dict[str, Any]:
    watch = Stopwatch(cell["prompts"])
    engine.generate(cell["prompts"], cell["num_tokens"], watch)
    lengths = {len(ids) for ids in watch.token_ids}
    assert lengths == {cell["num_tokens"]}, f"answers have {lengths} tokens, not {cell}"
    return {**watch.figures(), "token_ids": watch.token_ids}


def _end_with_parent() -> None:
    """Has the kernel kill this process when the driver dies, even while it is stopped."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def serve(load: Callable[[argparse.Namespace], Engine]) -> None:
    """Runs the loop of an engine's script, until its standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="folder or file in the engine's format")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", default="", help="what the engine's script understands")
    args = parser.parse_args()
    _end_with_parent()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # an engine's own output must not come between the answers

    def reply(work: Callable[[], dict[str, Any]]) -> bool:
        try:
            result = work()
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[-2000:]}
        out.write(json.dumps(result) + "\n")
        return "error" not in result

    engine: Engine | None = None

    def begin() -> dict[str, Any]:
        nonlocal engine
        started = time.perf_counter()
        engine = load(args)
        seconds = time.perf_counter() - started
        return {
            "version": engine.version,
            "weight_bytes": engine.weight_bytes,
            "load_s": seconds,
        }

    if not reply(begin) or engine is None:
        sys.exit(1)
    for line in sys.stdin:
        reply(lambda line=line: answer(engine, json.loads(line)))


def bytes_of(*files: Path) -> int:
    """Adds up the sizes of files."""
    return sum(file.stat().st_size for file in files)
