"""How long does choosing tokens take? Our two ops against transformers' logits processors.

    python benchmarks/sampling.py [--vocabularies 131072 250880] [--rows 1 32 128] [--threads 2]

Logits fall with the logarithm of a token's rank, with noise, as those of language models do. Ours
are `ops.penalize_logits` and `ops.sample_tokens`. transformers' side is what its `generate` does:
processors on all rows together, a softmax and `torch.multinomial`; and, as an engine must do whose
requests have settings and seeds of their own, the same row by row ("per row", for one row and 32).
Before anything is timed, 200 draws of ours must be among the tokens that transformers keeps.
Repeats are interleaved; a figure is their median.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results import make_parser, write_result
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dist_int8.int8 import ops
from dist_int8.int8.sampling_reference import SETTINGS

CASES: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "top-k 50, top-p 0.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "penalty, top-p 0.95": {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1},
}
PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
HISTORY = 512  # tokens of each sequence so far
MOST_PER_ROW = 32
BUDGET_S = 4.0  # of one cell
REPEATS = (3, 15)


def make_logits(rows: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    ranks = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(rows)])
    noise = torch.randn(rows, vocabulary, generator=generator)
    return -1.8 * (ranks + 1.0).log() + 0.5 * noise + 12.0


class Ours:
    """All rows by the ops."""

    def __init__(self, rule: dict[str, float], rows: int, history: Tensor) -> None:
        neutral = dict.fromkeys(SETTINGS, 0.0) | {"top_p": 1.0, "repetition_penalty": 1.0}
        row = [(neutral | rule)[name] for name in SETTINGS]
        self.settings = torch.tensor([row] * rows, dtype=torch.float64)
        self.slots = torch.arange(rows, dtype=torch.int32)
        self.lengths = torch.full((rows,), HISTORY, dtype=torch.int32)
        self.seeds = torch.arange(rows)
        self.history = history
        self.penalizes = "repetition_penalty" in rule

    def run(self, logits: Tensor) -> Tensor:
        if self.penalizes:
            args = (self.slots, self.lengths, self.settings, self.history)
            ops.penalize_logits(logits, *args)
        return ops.sample_tokens(logits, self.slots, self.lengths, self.settings, self.seeds)


class Theirs:
    """All rows, or one after the other, by transformers' processors."""

    def __init__(self, rule: dict[str, float], history: Tensor, per_row: bool) -> None:
        given = {name: int(value) if name == "top_k" else value for name, value in rule.items()}
        self.processors = LogitsProcessorList(
            make(given[name]) for name, make in PROCESSORS.items() if name in given
        )
        self.history = history.long()
        self.per_row = per_row
        self.generators = [torch.Generator().manual_seed(i) for i in range(len(history))]

    def keep(self, logits: Tensor) -> Tensor:
        """Probabilities, 0 for tokens that are not kept."""
        return self.processors(self.history[: len(logits)], logits).softmax(-1)

    def run(self, logits: Tensor) -> Tensor:
        if not self.processors:
            return logits.argmax(-1)
        if not self.per_row:
            return torch.multinomial(self.keep(logits), 1)
        tokens = []
        for i, generator in enumerate(self.generators):
            scores = self.processors(self.history[i : i + 1], logits[i : i + 1])
            tokens.append(torch.multinomial(scores.softmax(-1), 1, generator=generator))
        return torch.cat(tokens)


def check(rule: dict[str, float], logits: Tensor, history: Tensor) -> None:
    """Our draws are among the tokens that transformers keeps."""
    kept = Theirs(rule, history[:1], per_row=False).keep(logits[:1].clone())[0]
    ours = Ours(rule, 1, history[:1])
    for length in range(200 if rule else 1):
        ours.seeds[0] = length
        token = int(ours.run(logits[:1].clone()))
        assert kept[token] > 0 if rule else token == int(logits[0].argmax()), (rule, token)


def time_once(run: Callable[[Tensor], Tensor], logits: Tensor) -> float:
    mine = logits.clone()  # processors change it
    started = time.perf_counter()
    run(mine)
    return time.perf_counter() - started


def measure(rule: dict[str, float], logits: Tensor, history: Tensor) -> dict[str, float]:
    """Milliseconds per step of every side, medians of interleaved repeats."""
    rows = len(logits)
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": Ours(rule, rows, history).run,
        "transformers": Theirs(rule, history, per_row=False).run,
    }
    if rule and 1 < rows <= MOST_PER_ROW:
        sides["transformers, per row"] = Theirs(rule, history, per_row=True).run
    first = {name: time_once(run, logits) for name, run in sides.items()}
    repeats = min(max(REPEATS[0], int(BUDGET_S / sum(first.values()))), REPEATS[1])
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            samples[name].append(1e3 * time_once(run, logits))
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = make_parser(__doc__, takes_model=False)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[131_072, 250_880])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cells = []
    for vocabulary in args.vocabularies:
        for rows in args.rows:
            logits = make_logits(rows, vocabulary)
            history = torch.randint(0, vocabulary, (rows, HISTORY), dtype=torch.int32)
            for case, rule in CASES.items():
                check(rule, logits, history)
                found = measure(rule, logits, history)
                cells.append({"vocabulary": vocabulary, "rows": rows, "case": case, "ms": found})
                figures = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
                print(f"{vocabulary:>7} {rows:>4}  {case:<20} {figures} ms", flush=True)
    threads = {"threads": args.threads}
    write_result("sampling", threads | {"cells": cells}, args.json, args.raw)


if __name__ == "__main__":
    main()
