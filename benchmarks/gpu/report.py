"""The tables of README.md and benchmarks/README.md, from the records of first_light.py.

    python benchmarks/gpu/report.py            # compare: exit 1 where a table says something else
    python benchmarks/gpu/report.py --write    # write the tables

Records are the results.jsonl files kept as benchmarks/results/gpu/*.jsonl, one per card and day. A
table stands between `<!-- gpu:NAME -->` and `<!-- /gpu:NAME -->`. What ran on a CPU or with --small
is a rehearsal and never becomes a figure. Needs nothing but Python.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import records
from figures import Figures, Record, last_ends, last_runs

DOCUMENTS = ("README.md", "benchmarks/README.md")
RESULTS = Path("benchmarks/results/gpu")
NONE = "not run on a GPU yet"
DEFAULT = "rotated, 16 hot"
GOOD = ("passed", "skipped")
FAILURES_SHOWN = 4
SHOWN_ROWS = (1, 32, 2048)  # of M, in the table of linears: the records have more


def all_passed(found: Sequence[Record], names: Sequence[str]) -> bool:
    ends = last_ends(found)
    return all(name in ends and ends[name]["status"] in GOOD for name in names)


def summary(found: Sequence[Record], names: Sequence[str]) -> str:
    """Every step with its status and seconds, then what failed: some of each step, a line each."""
    ends, runs = last_ends(found), last_runs(found)
    lines = ["step             status       seconds"]
    for name, end in ends.items():
        note = "" if end["status"] == "passed" else f"   {end['last_line'][:90]}"
        lines.append(f"{name:16s} {end['status']:11s} {end['seconds']:8.1f}{note}")
        bad = [_failure(r) for r in runs.get(name, []) if r["kind"] in ("failure", "error", "lost")]
        lines += [f"    {line[:150]}" for line in bad[:FAILURES_SHOWN]]
        if len(bad) > FAILURES_SHOWN:
            lines.append(f"    and {len(bad) - FAILURES_SHOWN} more: results.jsonl has them all")
    missing = [name for name in names if name not in ends]
    bad = [name for name, end in ends.items() if end["status"] not in GOOD]
    total = len(ends) + len(missing)
    good = len(ends) - len(bad)
    left_out = _names("; not reached", missing)
    lines.append(f"{good} of {total} steps passed{_names('; not', bad)}{left_out}")
    return "\n".join(lines)


def _failure(record: Record) -> str:
    if record["kind"] == "error":
        return f"{', '.join(map(str, record['cell'].values()))}: {record['error']}"
    return f"{record['test'].rpartition('::')[2]}: {record['error']}"


def _names(title: str, names: Sequence[str]) -> str:
    return f"{title}: {', '.join(names)}" if names else ""


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    rows = rows or [[NONE] + [""] * (len(headings) - 1)]
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def linear(figures: Figures) -> str:
    headings = ["card", "N x K", "M", "outliers", "bf16, us", "plain W8A8, us", "int8, us"]
    headings += ["times bf16", "W8A8 times bf16", "times bitsandbytes", "of copy", "of int8 peak"]
    return table(
        headings,
        [
            [
                *(c["card"], f"{c['N']} x {c['K']}", c["M"], c["outliers"]),
                *(f"{c['times_us'][name]:.1f}" for name in ("bf16", "none", DEFAULT)),
                *(f"{c[name]:.2f}" for name in ("times_bf16", "none_times_bf16")),
                f"{c['times_bitsandbytes']:.1f}" if "times_bitsandbytes" in c else "",
                *(f"{c[name]:.2f}" if name in c else "" for name in ("of_copy", "of_int8")),
            ]
            for c in figures.of("linear", "cell", "N", "K", "M", "outliers")
            if c["M"] in SHOWN_ROWS
        ],
    )


def block(figures: Figures) -> str:
    headings = ["card", "batch", "context", "us under a graph", "us eager", "floor, us"]
    return table(
        [*headings, "times floor", "peak memory, GB", "planned, GB"],
        [
            [
                *(b["card"], b["batch"], b["context"]),
                *(f"{b[name]:.0f}" for name in ("graph_us", "eager_us", "floor_us")),
                f"{b['times_floor']:.2f}",
                f"{b['bytes']['peak'] / 1e9:.2f}",
                f"{(b['bytes']['weights_planned'] + b['bytes']['cache_planned']) / 1e9:.2f}",
            ]
            for b in figures.of("block", "decode", "batch", "context")
        ],
    )


def front(figures: Figures) -> str:
    """The whole model in README.md; a sentence where there is nothing to show."""
    if not figures.of("model", "decode", "card"):
        return "How fast it is on a GPU: not run on one yet."
    return (
        "Llama-3-8B's shape with random weights on one GPU, beside transformers without "
        "compilation ([how](benchmarks/README.md#a-whole-model)). Medians of three; transformers' "
        f"times scatter from run to run, so the ratios are rough:\n\n{model(figures)}"
    )


def model(figures: Figures) -> str:
    headings = ["card", "what", "batch", "context", "dist_int8, ms", "transformers bf16, ms"]
    rows = []
    for what in ("decode", "prefill"):
        found = figures.of("model", what, "engine", "batch", "context")
        theirs = {_cell(r): r for r in found if r["engine"] == "transformers"}
        for ours in (r for r in found if r["engine"] != "transformers"):
            other = theirs.get(_cell(ours))
            floor = f"{ours['floor_ms']:.2f}" if "floor_ms" in ours else ""
            rows.append(
                [
                    *(ours["card"], what + ours["engine"].removeprefix("ours")),
                    *(ours["batch"], ours["context"], f"{ours['ms']:.2f}"),
                    f"{other['ms']:.2f}" if other else "",
                    f"{other['ms'] / ours['ms']:.2f}" if other else "",
                    f"{ours['tokens_per_s']:.0f}",
                    floor,
                ]
            )
    return table([*headings, "ratio", "tokens/s", "floor, ms"], rows)


def _cell(record: Record) -> tuple[Any, ...]:
    return (record["card"], record["batch"], record["context"])


def stages(figures: Figures) -> str:
    return table(
        ["card", "stages", "batch", "ms per step", "tokens/s", "tokens of one stage"],
        [
            [
                *(r["card"], r["name"], r["batch"], f"{r['ms']:.2f}", f"{r['tokens_per_s']:.0f}"),
                "other weights" if r["claim"] == "other weights" else "yes" if r["equal"] else "no",
            ]
            for r in figures.of("stages", "layout", "name")
        ],
    )


def counters(figures: Figures) -> str:
    percent = ["of_bandwidth_pct", "of_tensor_pipe_pct", "occupancy_pct"]
    headings = ["card", "call", "kernel", "us", "of memory bandwidth", "of tensor pipe"]
    return table(
        [*headings, "occupancy", "registers"],
        [
            [
                *(k["card"], k["call"], f"`{k['kernel']}`"),
                f"{k['ns'] / 1e3:.1f}" if k.get("ns") else "",
                *(f"{k[name]:.0f}%" if k.get(name) is not None else "" for name in percent),
                f"{k['registers']:.0f}" if k.get("registers") else "",
            ]
            for k in figures.of("counters", "kernel", "call", "launch")
        ],
    )


def profile(figures: Figures) -> str:
    names = {"int8_bandwidth": 1e9, "float_bandwidth": 1e9, "int8_ops": 1e12, "float_ops": 1e12}
    rows = []
    for record in figures.of("device_profile", "profile"):
        measured, sheet = record["measured"], record["datasheet"] or {}
        for name, unit in names.items():
            known = sheet.get(name)
            rows.append(
                [
                    *(record["card"], name, f"{measured[name] / unit:.0f}"),
                    f"{known / unit:.0f}" if known else "",
                    f"{measured[name] / known:.2f}" if known else "",
                ]
            )
    return table(["card", "", "measured, GB/s or TOPS", "our table's", "ratio"], rows)


def tests(figures: Figures) -> str:
    counts = ("passed", "failed", "skipped", "seconds")
    rows = []
    for card in figures.cards():
        ends, runs = last_ends(figures.on(card)), last_runs(figures.on(card))
        for step, found in runs.items():
            parts = [record for record in found if record["kind"] == "tests"]
            if parts:  # several where it was started again behind a test that hung
                sums = [f"{sum(part[name] for part in parts):g}" for name in counts]
                rows.append([card, step, ends.get(step, {}).get("status", ""), *sums])
    return table(["card", "tests/gpu", "ended", "passed", "failed", "skipped", "seconds"], rows)


def status(figures: Figures) -> str:
    """The limit in README.md: what ran on which card, and what did not pass there."""
    if not figures.runs:
        return (
            "- **Nothing here has run on a GPU yet.** The CUDA kernels compile for five "
            "architectures; our own\n  also run on the host, in an emulator of the warp, where the "
            "tests compare them with the specification.\n  The CUTLASS ones, the NCCL path and the "
            "configurations for A100s are untested.\n  `make gpu` is there for the first machine "
            "that has one."
        )
    lines = []
    for card in figures.cards():
        runs = [run for run in figures.runs if run["card"] == card]
        commits = dict.fromkeys(
            run["commit"][:7] + " with changes" * (run["clean"] is False) for run in runs
        )
        steps = last_ends(figures.on(card)).values()
        bad = [f"{step['name']} ({step['status']})" for step in steps if step["status"] not in GOOD]
        lines.append(
            f"- Run on one {card} ({runs[-1]['time'][:10]}, commit {', '.join(commits)}): "
            f"{len(steps) - len(bad)} of {len(steps)} steps of first light passed"
            f"{_names('; not', bad)}.\n  Several GPUs and NCCL have not been run."
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[Figures], str]] = {
    function.__name__: function
    for function in (status, front, model, stages, block, linear, counters, profile, tests)
}


def rendered(text: str, figures: Figures) -> str:
    """A document with its tables made from the figures. Raises ValueError for an unknown table."""

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"gpu:{name}: a table must be one of {', '.join(TABLES)}")
        return f"<!-- gpu:{name} -->\n{TABLES[name](figures)}\n<!-- /gpu:{name} -->"

    return re.sub(r"<!-- gpu:(\w+) -->\n.*?<!-- /gpu:\1 -->", replaced, text, flags=re.DOTALL)


def claims(path: Path, figures: Figures) -> list[str]:
    """What is wrong with a document: lines of its tables that the records do not give."""
    text = path.read_text()
    starts, ends = (re.findall(rf"<!-- {end}gpu:(\w+) -->", text) for end in ("", "/"))
    if starts != ends:
        return [f"{path}: every <!-- gpu:NAME --> must have its end, got {starts} and {ends}"]
    wanted = rendered(text, figures)
    if wanted == text:
        return []
    wrong = [line for line in text.splitlines() if line not in wanted.splitlines()]
    return [f"{path}: no record says: {line}" for line in wrong] or [
        f"{path}: a table is not what the records give"
    ]


def check(root: Path, write: bool) -> list[str]:
    """What is wrong with the documents of a tree, after writing their tables if asked to."""
    figures = Figures((root / RESULTS).glob("*.jsonl"))
    paths = [root / name for name in DOCUMENTS]
    texts = "".join(path.read_text() for path in paths)
    missing = [name for name in TABLES if f"<!-- gpu:{name} -->" not in texts]
    wrong = [f"gpu:{name} stands in no document" for name in missing]
    for path in paths:
        if write:
            path.write_text(rendered(path.read_text(), figures))
        wrong += claims(path, figures)
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the tables")
    parser.add_argument("--root", type=Path, default=records.ROOT, help="tree of the documents")
    args = parser.parse_args(arguments)
    try:
        wrong = check(args.root, args.write)
    except ValueError as error:  # a damaged file of records, a table that nobody knows
        wrong = [str(error)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if wrong:
        print("report: write the tables with python benchmarks/gpu/report.py --write")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
