"""What does int8 cost in accuracy? Ours, published methods and other libraries, side by side.

    python benchmarks/accuracy.py [--model FOLDER] [--text FILE] [--tokens 51201] [--seeds 0 1 2]
        [--methods NAME ...] [--at-once 4] [--calibrate FILE] [--parts FOLDER] [--threads 2]

Measures what `dist-int8 eval` does (docs/accuracy.md), on the model as it is and, for each seed,
with outlier features injected; `ours` is what `quantize` makes, with hot columns. The work is split
into groups of a few methods. The figures of a group are written as soon as it is done (`--parts`)
and not measured again, so the benchmark can be stopped and resumed at any time. At the end it
prints one table of all groups measured with these settings and writes
build/benchmarks/accuracy.json, or the file that --json names.
"""

import json
import time
from pathlib import Path

from results import FOLDER, folder_of, make_parser, write_result

from dist_int8.config import load_settings
from dist_int8.evaluation.methods import DEFAULT, chosen
from dist_int8.evaluation.on_text import TextOptions, measure_text
from dist_int8.evaluation.report import markdown, merged, table
from dist_int8.int8 import ops

# rules other than the default, and the default without hot columns
RULES = ["accurate", "paper", "rotated-64", "row_rms-4+hot", "row_rms-4", "all+hot"]
PLAIN = "plain"
# settings that the figures depend on
DECIDING = ["model", "revision", "dtype", "int8", "accuracy", "rotation"]
DECIDING += ["outlier_rule", "outlier_threshold"]
DECIDING += ["skip_modules", "head", "embedding", "kv", "calibrate", "num_hot_columns"]
# one entry per linear and method, megabytes in total; `dist-int8 eval --json` has them
TOO_LONG = ("layer_errors", "inputs")


def measured_so(folder: Path, question: list, seed: int | None) -> list[dict]:
    """Reads the figures of the groups that answer the same question, oldest first."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    parts = [part for part in parts if part["question"] == [*question, seed]]
    return [part["figures"] for part in parts]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--text", type=Path, help="file or folder (default: Python's help topics)")
    parser.add_argument(
        "--tokens", type=int, default=51_201, help="maximum number of tokens of the text"
    )
    parser.add_argument(
        "--first-token", type=int, default=5000, help="number of tokens to skip (%(default)s)"
    )
    parser.add_argument("--window", type=int)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--no-plain", action="store_true", help="only with outlier features")
    parser.add_argument(
        "--methods", nargs="*", help="default: those of `dist-int8 eval` and our rules"
    )
    parser.add_argument("--at-once", type=int, default=4, help="methods per group")
    parser.add_argument("--layer-tokens", type=int, default=512)
    parser.add_argument(
        "--calibrate",
        default="random",
        help="hot columns of `ours` and the rules: random or a file",
    )
    parser.add_argument("--calibration-text", type=Path, help="text that calibrates smoothquant")
    parser.add_argument("--num-hot-columns", type=int)
    parser.add_argument("--accuracy", help="named point of `ours` (default: balanced)")
    parser.add_argument("--rotation", type=int)
    parser.add_argument("--outlier-rule")
    parser.add_argument("--outlier-threshold", type=float)
    parser.add_argument(
        "--parts", type=Path, default=FOLDER / "accuracy", help="folder of the groups"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    model = folder_of(args)
    installed = set(chosen(None))
    methods = chosen(args.methods) if args.methods else [n for n in DEFAULT if n in installed]
    if not args.methods:
        methods += [*RULES, "ours-head", "ours-embedding", "ours-kv"]
    settings = load_settings(
        model=model,
        calibrate=args.calibrate,
        num_hot_columns=args.num_hot_columns,
        accuracy=args.accuracy,
        rotation=args.rotation,
        outlier_rule=args.outlier_rule,
        outlier_threshold=args.outlier_threshold,
        threads_per_stage=args.threads,
    )
    how = {
        "text": args.text,
        "first_token": args.first_token,
        "num_tokens": args.tokens,
        "window": args.window,
        "stride": args.stride,
        "layer_tokens": args.layer_tokens,
        "calibration_text": args.calibration_text,
    }
    # what a group was measured with; if it differs, all groups are measured again
    asked = [settings.model_dump(mode="json", include=set(DECIDING)), how]
    question = json.loads(json.dumps(asked, default=str))
    columns = []
    for seed in [*([] if args.no_plain else [None]), *args.seeds]:
        heading = PLAIN if seed is None else f"features, seed {seed}"
        known = {n for part in measured_so(args.parts, question, seed) for n in part["methods"]}
        missing = [name for name in methods if name not in known]
        print(f"{heading}: {len(methods) - len(missing)} methods already measured", flush=True)
        for i in range(0, len(missing), args.at_once):
            group = missing[i : i + args.at_once]
            begin = time.perf_counter()
            _, figures = measure_text(settings, group, TextOptions(seed=seed, **how))
            seconds = time.perf_counter() - begin
            path = args.parts / f"{time.time_ns()}.json"
            part = {"question": [*question, seed], "seconds": seconds, "figures": figures}
            write_result("accuracy", part, path, raw=True)
            print(f"{seconds:.0f} s\n{table(figures)}\n", flush=True)
        values = merged(measured_so(args.parts, question, seed))
        columns.append((heading, {k: v for k, v in values.items() if k not in TOO_LONG}))
    print(markdown(columns), end="\n\n")
    write_result(
        "accuracy",
        {
            "int8_ops": ops.library_info()["cpu_instruction_set"],
            "runs": dict(columns),
        },
        args.json,
        args.raw,
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"accuracy: {error}") from None
