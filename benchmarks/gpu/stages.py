"""Do stages that share a card give the tokens of one stage, and how fast are they?

    python benchmarks/gpu/stages.py [--records FILE]
    python benchmarks/gpu/stages.py --device cpu --small    # tries the script out, measures nothing

The model of model.py, cut in two: stages as threads of one process and as two ranks over gloo. With
one micro-batch in flight their tokens must be those of one stage, although prompts are cut
otherwise, so that other rows share a micro-batch; with two, whether they are is recorded. NCCL,
which takes no card twice, must be refused in one line before a rank is started.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from model import (
    Prompts,
    free_memory,
    lengths_of,
    measure_decode,
    prompts_of,
    settings_of,
    shape_folder,
    tokens_of,
)
from records import Records, make_parser
from timing import environment

import dist_int8

BATCH = 8
LAYOUT_S = 75.0
ONE = "one stage"
MUST, MAY = "must", "may"  # be equal to one stage's tokens


def layouts(card: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Arguments of load() by name, and whether their tokens are those of one stage."""
    twice: dict[str, Any] = {"devices": [card, card], "micro_batches": 1}
    gloo = {"backend": "gloo"} if card != "cpu" else {}
    return {
        ONE: ({"devices": [card], "micro_batches": 1}, MUST),
        "two threads": ({**twice, "in_process": True}, MUST),
        "two threads, two micro-batches": ({**twice, "in_process": True, "micro_batches": 2}, MAY),
        "two ranks over gloo": ({**twice, **gloo}, MUST),
    }


def run(folder: Path, small: bool, arguments: dict[str, Any], prompts: Prompts) -> dict[str, Any]:
    started = time.perf_counter()
    with dist_int8.load(folder, **settings_of(small), **arguments) as model:
        load_s = time.perf_counter() - started
        count = lengths_of(small)[2]
        generate = tokens_of(model)
        tokens = generate(prompts, count)
        return {"tokens": tokens, "load_s": load_s, **measure_decode(generate, prompts, count)}


def check_refusal(folder: Path, small: bool) -> dict[str, Any]:
    """That load() refuses NCCL between two stages on one card, in a line."""
    try:
        dist_int8.load(folder, devices=["cuda:0", "cuda:0"], **settings_of(small)).shutdown()
    except ValueError as error:
        assert "each GPU once" in str(error) and "\n" not in str(error), error
        return {"said": str(error)}
    raise AssertionError("NCCL on one card is not refused")


class Layouts:
    """Runs layouts one after the other and compares their tokens with those of one stage."""

    def __init__(self, cells: Cells, folder: Path, args: argparse.Namespace) -> None:
        self.cells, self.folder, self.small = cells, folder, args.small
        vocab_size = 320 if args.small else 128256
        self.prompts = prompts_of(BATCH, lengths_of(args.small)[1], vocab_size)
        self.card = "cuda:0" if args.device == "cuda" else "cpu"
        self.expected: Prompts | None = None

    def run(self, name: str, arguments: dict[str, Any], claim: str) -> None:
        cell = {"name": name, "batch": BATCH, "claim": claim}
        found = self.cells.run(
            "layout", cell, lambda: self.measure(name, arguments, claim), LAYOUT_S
        )
        if found is not None:
            print(
                f"{name:32s} {found['ms']:9.2f} ms per step  {found['tokens_per_s']:9.1f} tokens/s"
                f"  loaded in {found['load_s']:5.1f} s"
                f"  tokens {'equal' if found['equal'] else 'differ'}",
                flush=True,
            )

    def measure(self, name: str, arguments: dict[str, Any], claim: str) -> dict[str, Any]:
        if self.expected is None and name != ONE:  # begun again behind it
            alone, _ = layouts(self.card)[ONE]
            self.expected = run(self.folder, self.small, alone, self.prompts)["tokens"]
            free_memory(torch.device(self.card))
        found = run(self.folder, self.small, arguments, self.prompts)
        tokens = found.pop("tokens")
        if name == ONE:
            self.expected = tokens
        equal = tokens == self.expected
        assert equal or claim != MUST, f"{name}: the tokens must be those of one stage, they differ"
        return {**found, "equal": equal}


def main() -> int:
    args = make_parser(__doc__).parse_args()
    device = torch.device(args.device)
    records = Records(args.records, "stages")
    cells = Cells(records, args.skip_tried)
    records.add("environment", **environment(device))
    with shape_folder(args.small) as folder:
        if device.type == "cuda":
            cells.run("refusal", {"of": "NCCL"}, lambda: check_refusal(folder, args.small))
        all_layouts = Layouts(cells, folder, args)
        for name, (arguments, claim) in layouts(all_layouts.card).items():
            all_layouts.run(name, arguments, claim)
            free_memory(device)
    return cells.status()


if __name__ == "__main__":
    sys.exit(main())
