"""Draws the picture at the top of the README from the recorded results; measures nothing.

    python docs/pictures.py [--out docs/images/perplexity.svg]

One row per method: the change of perplexity against fp32 with the demo model as it is, and with
outlier features like those of large models injected (the mean of the seeds). The figures come from
benchmarks/results/accuracy.json and accuracy_features.json, ours from accuracy_rotated.json, which
benchmarks/accuracy.py writes.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
OUT = Path(__file__).parent / "images" / "perplexity.svg"
# method of the records, name in the picture
METHODS = {
    "ours": "dist_int8",
    "smoothquant": "SmoothQuant-style",
    "llm.int8": "LLM.int8() (paper)",
    "bitsandbytes": "bitsandbytes, 6.0",
    "vector-wise": "naive W8A8",
    "torchao": "torchao, dynamic",
}
OURS, OTHERS = ("#2f6db3", "#9dc0e6"), ("#6b6b6b", "#c4c4c4")
STYLE = {
    "font.size": 14,
    "axes.titlesize": 17,
    "axes.titleweight": "bold",
    "savefig.facecolor": "white",  # readable on a dark page too
    "svg.hashsalt": "dist_int8",  # the same figures give the same file
}


def read_changes() -> dict[str, tuple[float, float]]:
    """Change of perplexity in percent: as it is, and with features (the mean of seeds)."""
    changes = {name: read_runs(name) for name in METHODS}
    return {
        name: (plain, statistics.mean(features)) for name, (plain, *features) in changes.items()
    }


def read_runs(method: str) -> list[float]:
    """Changes of perplexity of one method in percent: as it is, and with features of each seed."""
    files = ["accuracy_rotated"] if method == "ours" else ["accuracy", "accuracy_features"]
    runs: dict[str, Any] = {}
    for name in files:
        runs |= json.loads((RESULTS / f"{name}.json").read_text())["runs"]
    return [run["methods"][method]["change_percent"] for run in runs.values()]


def draw(changes: dict[str, tuple[float, float]], path: Path) -> None:
    """Horizontal bars, two per method, on an axis cut at 6%; longer bars end in an arrow."""
    limit = 6.0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        axes = figure.subplots()
        for row, name in enumerate(METHODS):
            colours = OURS if name == "ours" else OTHERS
            for place, change, colour in zip((-0.2, 0.2), changes[name], colours, strict=True):
                axes.barh(row + place, min(change, limit), 0.36, color=colour)
                _label(axes, row + place, change, limit)
        axes.set_yticks(range(len(METHODS)), METHODS.values())
        axes.get_yticklabels()[0].set_weight("bold")
        axes.set_xlim(0.0, limit)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title("What int8 costs: perplexity against fp32, lower is better", loc="left")
        axes.set_xlabel(
            "increase in perplexity, %  (SmolLM2-135M-Instruct, 51,200 tokens; dist_int8: 10,240)"
        )
        _legend(axes)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)


def _label(axes: Any, place: float, change: float, limit: float) -> None:
    inside = change > limit
    axes.annotate(
        f"{change:+.0f}% \N{RIGHTWARDS ARROW}" if inside else f"{change:+.2f}%",
        (min(change, limit), place),
        xytext=(-8 if inside else 6, 0),
        textcoords="offset points",
        ha="right" if inside else "left",
        va="center",
        fontsize=12,
    )


def _legend(axes: Any) -> None:
    from matplotlib.patches import Patch

    keys = [
        Patch(color=OTHERS[0], label="demo model"),
        Patch(color=OTHERS[1], label="plus the outlier features of large models"),
    ]
    axes.legend(handles=keys, loc="lower right", bbox_to_anchor=(1.0, 0.62), frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="picture: .svg, .png or .pdf")
    args = parser.parse_args()
    draw(read_changes(), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
