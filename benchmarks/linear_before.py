"""A linear of another copy of this project, in a process of that copy's environment.

Run with an interpreter that imports the other dist_int8, this file is the process: it reads pairs
of JSON lines and tensors from files that `Before` names, and answers one line each.
"""

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NUM_HOT = 16
PAUSE_S, WARM_S, COUNTED_S, LONG_S = 0.02, 0.12, 0.03, 0.3
RULE = {"outlier_rule": "row_rms", "outlier_threshold": 4.0}


def make_layer(N: int, K: int) -> Tensor:
    """The weight [N, K] that every process makes for itself."""
    return torch.randn(N, K, generator=torch.Generator().manual_seed(N + K)) / K**0.5


def seconds_per_call(function: Callable[[], object]) -> float:
    """Median seconds of calls that follow each other, as those of decoding do.

    In the pause the threads of whoever ran before go to sleep (torch's spin on for some
    milliseconds). Cores and memory that have slept are slow for some milliseconds more. Both pass
    in calls that do not count, long enough to go through all copies of a weight once, as the token
    before has. A call that takes long is its own measurement.
    """
    time.sleep(PAUSE_S)
    begun = time.perf_counter()
    samples: list[float] = []
    while not samples or time.perf_counter() < begun + WARM_S + COUNTED_S:
        started = time.perf_counter()
        function()
        seconds = time.perf_counter() - started
        if seconds > LONG_S:
            return seconds
        if started > begun + WARM_S:
            samples.append(seconds)
    return statistics.median(samples)


class Before:
    """The other process; it sleeps while others are measured."""

    def __init__(self, python: Path, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name)
        self._x, self._y = path / "x.safetensors", path / "y.safetensors"
        command = [str(python), __file__, str(threads), str(self._x), str(self._y)]
        environment = {**os.environ, "PYTHONPATH": ""}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=path,
        )

    def _ask(self, *words: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("linear: the process of --before ended; its error is above")
        return json.loads(line)

    def make(self, N: int, K: int, num_copies: int) -> None:
        self._ask("make", N, K, num_copies)

    def result(self, x: Tensor) -> Tensor:
        """Takes x for what follows; returns what the layer makes of it."""
        save_file({"x": x}, self._x)
        self._ask("result")
        return load_file(self._y)["y"]

    def seconds(self) -> float:
        """Seconds of one call with the last x."""
        return float(self._ask("time"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


class Layer:
    """The layer in the other process."""

    def __init__(self, N: int, K: int, num_copies: int) -> None:
        from dist_int8.int8 import reference

        weight = make_layer(N, K)
        self.hot_columns = torch.arange(0, K, K // NUM_HOT)[:NUM_HOT].int()
        self.hot_weight = weight[:, self.hot_columns.long()].bfloat16()
        cold = weight.index_fill(1, self.hot_columns.long(), 0.0)
        weight_int8, self.col_scale = reference.quantize_weight(cold)
        self.copies = itertools.cycle([weight_int8.clone() for _ in range(num_copies)])

    def __call__(self, x: Tensor) -> Tensor:
        from dist_int8.int8 import ops

        hot = {"hot_columns": self.hot_columns, "hot_weight": self.hot_weight}
        return ops.int8_linear(x, next(self.copies), self.col_scale, **RULE, **hot)


@torch.inference_mode()
def serve(threads: int, x_file: Path, y_file: Path) -> None:
    torch.set_num_threads(threads)
    layer, x = None, None
    for line in sys.stdin:
        word, *sizes = json.loads(line)
        answer: Any = None
        if word == "make":
            layer = Layer(*sizes)
        elif word == "result":
            x = load_file(x_file)["x"]
            save_file({"y": layer(x)}, y_file)
        else:
            answer = seconds_per_call(functools.partial(layer, x))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
