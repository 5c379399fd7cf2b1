"""A picture of a trace: what each stage did when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST = 300  # slices a stage; more are thinner than a pixel


def plot(trace: Path, picture: Path) -> str:
    """Draws a trace file into `picture`, in the format that its ending names (png, svg, pdf).

    A row a stage, a bar a micro-batch: a colour a lane, prompts hatched. A trace of more than MOST
    micro-batches is drawn up to there.

    Returns:
        One line: micro-batches and seconds drawn, and how busy each stage was.

    Raises:
        ValueError: matplotlib is not installed, or the file is no trace of `generate --trace`.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ValueError(
            "dist-int8 bench:plot: matplotlib must be installed, got none; "
            'pip install "dist_int8[plot]"'
        ) from None
    stages = _stages(trace)
    begin = min(start for bars in stages for start, _, _ in bars)
    end = max(start + length for bars in stages for start, length, _ in bars)
    busy = [sum(length for _, length, _ in bars) / (end - begin) for bars in stages]
    figure = Figure(figsize=(16, 1.5 + 0.7 * len(stages)), layout="constrained")
    axes = figure.subplots()
    for stage, bars in enumerate(stages):
        for start, length, name in bars:
            axes.broken_barh(
                [((start - begin) / 1e3, length / 1e3)],
                (stage - 0.4, 0.8),
                facecolor=f"C{_lane(name) % 10}",
                edgecolor="white",
                linewidth=0.5,
                hatch="///" if name[0] == "P" else None,
            )
    axes.set_yticks(
        range(len(stages)), [f"stage {i}\n{share:.0%} busy" for i, share in enumerate(busy)]
    )
    axes.set_xlim(0.0, (end - begin) / 1e3)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    lanes = sorted({_lane(name) for bars in stages for _, _, name in bars})
    keys = [Patch(facecolor=f"C{lane % 10}", label=f"lane {lane}") for lane in lanes]
    keys.append(Patch(facecolor="white", edgecolor="black", hatch="///", label="with prompts"))
    figure.legend(handles=keys, loc="outside upper right", ncols=len(keys), frameon=False)
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dist-int8 bench:plot: plot must be a picture that can be written, got {picture} "
            f"({' '.join(str(error).split())}); write it like timeline.png"
        ) from None
    shares = ", ".join(f"stage {stage} busy {share:.0%}" for stage, share in enumerate(busy))
    count = max(map(len, stages))
    return f"{picture}: {count} micro-batches in {(end - begin) / 1e6:.2f} s; {shares}"


def _stages(trace: Path) -> list[list[tuple[float, float, str]]]:
    """(start, duration, name) of every slice of every stage, in microseconds."""
    try:
        events = json.loads(trace.read_bytes())["traceEvents"]
        slices: list[dict[str, Any]] = [event for event in events if event["ph"] == "X"]
        num_stages = 1 + max(int(event["tid"]) for event in slices)
        found = [
            [
                (float(event["ts"]), float(event["dur"]), str(event["name"]))
                for event in slices
                if event["tid"] == stage
            ][:MOST]
            for stage in range(num_stages)
        ]
        for _, _, name in (one for bars in found for one in bars):
            _lane(name)
        assert all(found)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "something else"
        raise ValueError(
            f"{trace}: trace must be a file of dist-int8 generate --trace, got {reason}; "
            "make one, or leave it out"
        ) from None
    return found


def _lane(name: str) -> int:
    return int(name[1:])
