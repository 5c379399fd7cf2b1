"""How fast is this project on a CPU beside other engines, and beside what the machine can do?

    python benchmarks/peers.py --setup DIR                      # once: environments and models
    python benchmarks/peers.py DIR --threads 2                  # everything
    python benchmarks/peers.py DIR --threads 2 --neighbours 1   # beside one busy process
    python benchmarks/peers.py DIR --engines dist_int8 openvino --models demo --cells decode-1

Every engine runs in its own process and environment, stays loaded, and works while the others
wait; repeats go round the engines. All get the same prompts as token ids and answer greedily, past
any end token. Decode counts the tokens after every sequence has its first one (prompts of 32
tokens), prefill is one prompt up to its first new token. Correctness first: the greedy answers to
three prompts are compared with fp32 transformers.

Figures are appended to DIR/peers.jsonl as they come (--records), and a call goes on with what is
missing there. An engine that fails is reported with its own error and does not stop the others.
"""

import argparse
import datetime
import signal
import sys
from pathlib import Path

from decode import TEXT
from engines.catalogue import CELLS, ENGINES, MODELS
from engines.comparison import Comparison, Conditions
from engines.install import set_up
from engines.machine import describe_machine, measure_machine
from engines.table import format_table, summarize_records
from gpu.records import Records, read
from results import add_json, write_result
from transformers import AutoTokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="environments, models, logs and records")
    parser.add_argument("--setup", action="store_true", help="install and convert, then end")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens when decoding")
    parser.add_argument(
        "--neighbours", type=int, default=0, help="busy processes beside the measured engine"
    )
    parser.add_argument(
        "--pin", action="store_true", help="keep each neighbour on one core, in order"
    )
    parser.add_argument("--limit", type=float, default=300, help="most seconds of one answer")
    parser.add_argument("--records", type=Path, help="file of all figures; default: peers.jsonl")
    add_json(parser)
    args = parser.parse_args()
    for name, least in (("threads", 1), ("repeats", 1), ("tokens", 2), ("neighbours", 0)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    return args


def measure(args: argparse.Namespace, model: str, conditions: Conditions, records: Records) -> None:
    """Measures all cells of one model, round by round."""
    tokenizer = AutoTokenizer.from_pretrained(
        args.folder / "models" / "demo", trust_remote_code=False
    )
    words = tokenizer(TEXT * 50).input_ids
    comparison = Comparison(model, conditions, records, words)
    try:
        for repeat in range(args.repeats):
            for cell in args.cells:
                for i in range(len(args.engines)):
                    engine = args.engines[(i + repeat) % len(args.engines)]
                    record = comparison.measure(engine, cell, repeat)
                    if record is None:
                        continue
                    got = record.get("error") or f"{record['tokens_per_s']:,.1f} tokens/s"
                    now = datetime.datetime.now().strftime("%H:%M:%S")
                    print(f"{now} {model} {cell} {engine}: {got}", flush=True)
    finally:
        comparison.end()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the engines too
    args = parse_arguments()
    if args.setup:
        raise SystemExit(1 if set_up(args.folder, args.engines, args.models) else 0)
    path = args.records or args.folder / "peers.jsonl"
    records = Records(path, "peers")
    conditions = Conditions(
        args.folder, args.threads, args.neighbours, args.pin, args.tokens, args.limit
    )
    machine = {**describe_machine(), **measure_machine(args.folder, args.threads)}
    print(machine, flush=True)
    records.add("machine", **machine, conditions=conditions.key())
    for model in args.models:
        measure(args, model, conditions, records)
    summary = summarize_records(list(read(path)), conditions.key(), args.folder / "models")
    print(format_table(summary))
    named = ("threads", "neighbours", "pinned", "num_tokens")
    setting = dict(zip(named, conditions.key(), strict=True))
    write_result("peers", {**setting, "machine": machine, "models": summary}, args.json, raw=True)


if __name__ == "__main__":
    main()
