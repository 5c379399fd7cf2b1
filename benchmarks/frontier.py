"""Which int8 numerics lose least for their bytes and work? A table to choose defaults by.

    python benchmarks/frontier.py [--model FOLDER] [--tokens 51201] [--texts topics legal fiction]
        [--seeds 0 1 2] [--points NAME ...] [--legal FILE ...] [--parts FOLDER] [--threads 2]

Rotation of x and W (none, blocks of 16, 64, 128, the largest), scales per row and output feature or
per group of input features, 0 to 64 hot columns or a share of K, outlier rules; then int8 head,
embedding, and keys and values (where transformers lets us change the attention). Linears of
transformers' fp32 model are replaced by ones that compute what `dist_int8.int8.reference` says,
which is asserted first. Hot columns are found on 1,024 random tokens, as `quantize` finds them.

For each text: change of perplexity with its standard error over windows, and KL divergence per
token to fp32, plain and, for each seed, with outlier features injected. Beside them bytes of the
linears (relative to one int8 plane without hot columns), tensor-core steps of a tile of outputs
(relative likewise; a step is 32 input features in int8, or 16 hot columns in 16 bits; the second
plane of a dynamic rule counts where a tile of 128 rows x 64 columns of x has an outlier), and the
scaled sums that an output adds (one, or one per group).

A row of the table is written as soon as it is measured (`--parts`) and not measured again, so the
benchmark can be stopped and resumed. At the end it prints the table and writes
build/benchmarks/frontier.json, or the file that --json names. 51,200 tokens of three texts take
hours; --tokens 2049 shows the order of points in minutes.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from frontier_models import Subject, rounds_kv
from frontier_points import LARGEST, Point, check_linear
from public_domain import HELD_OUT, works
from results import FOLDER, folder_of, make_parser, write_result
from torch import Tensor
from transformers import AutoTokenizer

from dist_int8.evaluation.perplexity import Scores, log_probabilities_, windows
from dist_int8.evaluation.texts import read_text, tokens_of

# Debian's folder of licenses: long English prose of lawyers that calibration never sees.
LICENSES = Path("/usr/share/common-licenses")
LEGAL = ("GPL-3", "MPL-2.0", "GFDL-1.3", "Apache-2.0", "Artistic", "GPL-2", "LGPL-2.1", "CC0-1.0")

POINTS = (
    # without rotation: one plane, the former default (row_rms 4.0), the paper's rule, two planes
    Point(0, 0),
    Point(0, 16, choose="absmax"),
    Point(0, 16, choose="absmax", rule="row_rms", threshold=4.0),
    Point(0, 0, rule="absolute", threshold=6.0),
    Point(0, 16, rule="all"),
    # rotated, one plane
    *(Point(64, hot) for hot in (0, 8, 16, 32, 64, "K/64", "K/32", "K/16")),
    Point(64, 16, choose="absmax"),
    *(Point(64, 16, down) for down in (32, 64, 128)),
    Point(64, 32, 128),
    *(Point(size, 16) for size in (16, 128, LARGEST)),
    *(Point(LARGEST, hot, 4 * hot) for hot in (16, 32)),
    Point(64, 16, rule="row_rms", threshold=4.0),
    Point(64, 16, rule="all"),
    Point(64, 16, 64, rule="all"),
    Point(64, 32, 128, rule="all"),
    Point(64, 64, rule="all"),
    # groups
    Point(0, 0, activation_group=32, weight_group=32),
    Point(0, 16, activation_group=64, weight_group=64),
    Point(64, 16, activation_group=64),
    Point(64, 16, weight_group=64),
    Point(64, 16, activation_group=128, weight_group=128),
    Point(64, 16, activation_group=64, weight_group=64),
    Point(64, 16, 64, activation_group=64, weight_group=64),
    Point(64, 32, activation_group=64, weight_group=64),
    Point(64, 64, activation_group=64, weight_group=64),
    # beyond the blocks
    Point(64, 16, 64, int8_head=True),
    Point(64, 16, 64, int8_embedding=True),
    Point(64, 16, 64, int8_kv=True),
    Point(64, 16, 64, int8_head=True, int8_embedding=True),
    Point(64, 16, 64, int8_head=True, int8_embedding=True, int8_kv=True),
)
BY_NAME = {point.name: point for point in POINTS}
PLAIN = "plain"


@dataclass(frozen=True)
class Text:
    """A text to measure on: token ids, int64 [tokens]."""

    name: str
    token_ids: Tensor


def read_texts(tokenizer: Any, args: argparse.Namespace) -> list[Text]:
    """Reads the texts that are asked for, each of at most `--tokens` tokens."""
    found = []
    for name in args.texts:
        skip = 0
        if name == "topics":
            text, _ = read_text(None)
            skip = args.first_token
        elif name == "fiction":
            every = works()
            text = "\n".join(every[work] for work in HELD_OUT)
        else:
            files = args.legal or [LICENSES / file for file in LEGAL]
            text = "\n".join(read_text(file)[0] for file in files)
        found.append(Text(name, tokens_of(tokenizer, text, args.tokens, skip)))
    return found


@torch.inference_mode()
def measure(subject: Subject, points: Sequence[Point], text: Text, window: int) -> list[dict]:
    """Measures points on a text, all of them on a window before the next one."""
    places = windows(len(text.token_ids), window, window)
    scores, base = [Scores() for _ in points], Scores()
    for place in places:
        ids = text.token_ids[place.begin : place.end]
        targets = text.token_ids[place.first : place.end + 1]
        logits = subject.logits(ids)
        base.add(logits, targets, None)
        expected = log_probabilities_(logits)
        for point, score in zip(points, scores, strict=True):
            with subject.computing(point):
                score.add(subject.logits(ids), targets, expected)
    return [
        {
            "change": score.change_percent(base),
            "KL": score.mean_divergence,
            "agreement": score.agreement_percent,
            "fp32": base.perplexity,
            "tokens": sum(score.num_targets),
            **subject.cost(point),
        }
        for point, score in zip(points, scores, strict=True)
    ]


def part_of(args: argparse.Namespace, text: Text, seed: int | None, point: Point) -> Path:
    """The file of one figure: its name is a checksum of all that the figure depends on."""
    digest = hashlib.sha256(text.token_ids.numpy().tobytes()).hexdigest()
    asked = [str(args.model), digest, args.window, seed, asdict(point)]
    name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:20]
    return args.parts / f"{name}.json"


def measure_all(args: argparse.Namespace, points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Measures what is missing; returns figures by point and by "text, plain" or "text, seed"."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    texts = read_texts(tokenizer, args)
    rows: dict[str, dict[str, Any]] = {point.name: {} for point in points}
    for seed in [*([] if args.no_plain else [None]), *args.seeds]:
        subject = None
        for text in texts:
            column = f"{text.name}, {PLAIN if seed is None else f'seed {seed}'}"
            paths = {point: part_of(args, text, seed, point) for point in points}
            missing = [point for point, path in paths.items() if not path.is_file()]
            for begin in range(0, len(missing), args.at_once):
                group = missing[begin : begin + args.at_once]
                subject = subject or Subject(args.model, seed)
                started = time.perf_counter()
                for point, figures in zip(
                    group, measure(subject, group, text, args.window), strict=True
                ):
                    paths[point].parent.mkdir(parents=True, exist_ok=True)
                    paths[point].write_text(json.dumps({"point": point.name, column: figures}))
                    change, error = figures["change"]
                    spread = "" if error is None else f" +- {error:.3f}"
                    kl = 1e4 * figures["KL"][0]
                    print(f"{column}: {point.name}: {change:+.3f}%{spread}, KL {kl:.2f}e-4")
                subject.forget(group)
                print(f"{time.perf_counter() - started:.0f} s", flush=True)
            for point, path in paths.items():
                rows[point.name][column] = json.loads(path.read_text())[column]
    return rows


def choose_points(args: argparse.Namespace) -> list[Point]:
    """The points asked for, without those that the model's attention does not allow."""
    points = [BY_NAME[name] for name in args.points] if args.points else list(POINTS)
    if rounds_kv(args.model):
        return points
    left_out = [point.name for point in points if point.int8_kv]
    print(f"left out, since the attention cannot be replaced: {'; '.join(left_out) or 'nothing'}")
    return [point for point in points if not point.int8_kv]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: for each text the change of perplexity in percent, and KL in 1e-4 nats."""
    columns = list(next(iter(rows.values())))
    heading = ["", "bytes", "work", "sums", *(f"{name}: change, %; KL" for name in columns)]
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for name, found in rows.items():
        cost = found[columns[0]]
        cells = [name, f"{cost['bytes']:.3f}", f"{cost['work']:.2f}", f"{cost['sums']:.0f}"]
        for column in columns:
            change, error = found[column]["change"]
            spread = "" if error is None else f" +- {error:.2f}"
            cells.append(f"{change:+.2f}{spread}; {1e4 * found[column]['KL'][0]:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=51_201, help="of each text, at most")
    parser.add_argument("--first-token", type=int, default=5000, help="of the help topics")
    parser.add_argument("--window", type=int, default=1024)
    texts = ("topics", "legal", "fiction")
    parser.add_argument("--texts", nargs="+", choices=texts, default=texts)
    parser.add_argument("--legal", type=Path, nargs="+", help="files (default: Debian's licenses)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--no-plain", action="store_true", help="only with outlier features")
    parser.add_argument("--points", nargs="+", choices=BY_NAME, help="default: all", metavar="NAME")
    parser.add_argument("--list-points", action="store_true", help="print their names and exit")
    parser.add_argument("--at-once", type=int, default=4, help="points in memory at a time")
    parser.add_argument("--parts", type=Path, default=FOLDER / "frontier", help="folder of rows")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.list_points:
        print("\n".join(BY_NAME))
        return
    torch.set_num_threads(args.threads)
    check_linear()
    args.model = folder_of(args)
    rows = measure_all(args, choose_points(args))
    print(table(rows))
    write_result("frontier", {"model": Path(args.model).name, "rows": rows}, args.json, args.raw)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"frontier: {error}") from None
