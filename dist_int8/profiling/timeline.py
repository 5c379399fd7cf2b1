"""A picture of a trace: what each stage did when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_SLICES = 300  # per stage; more would be thinner than a pixel
COLOURS = ("#2f6db3", "#ee8a2c", "#3a9d6b", "#c8504e", "#7d68b5", "#8c6b4f")
_STYLE: Any = {
    "font.size": 14,
    "axes.titlesize": 17,
    "axes.titleweight": "bold",
    "hatch.linewidth": 1.6,
    "savefig.facecolor": "white",  # readable on a dark page too
    "svg.hashsalt": "dist_int8",  # the same trace gives the same file
}
Slice = tuple[float, float, str]


def plot(trace: Path, picture: Path) -> str:
    """Draws a trace file into `picture`, in the format given by its suffix (png, svg, pdf).

    One row per stage, one bar per micro-batch, one colour per lane; micro-batches that carry
    prompt tokens are hatched. Only the first MAX_SLICES micro-batches of a stage are drawn.

    Returns:
        One line: micro-batches and seconds drawn, and how busy each stage was.

    Raises:
        ValueError: matplotlib is not installed, the file is not a trace written by
            `generate --trace`, or the picture cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "dist-int8 bench:plot: matplotlib must be installed, got none; "
            'pip install "dist_int8[plot]"'
        ) from None
    stages = _read_stages(trace)
    begin = min(start for bars in stages for start, _, _ in bars)
    end = max(start + length for bars in stages for start, length, _ in bars)
    busy = [sum(length for _, length, _ in bars) / (end - begin) for bars in stages]
    count = max(map(len, stages))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12, 2.2 + 0.8 * len(stages)), layout="constrained")
        axes = figure.subplots()
        _draw_bars(axes, stages, begin)
        axes.set_title(f"{count} micro-batches through {len(stages)} stages", loc="left")
        axes.set_yticks(
            range(len(stages)), [f"stage {i}\n{share:.0%} busy" for i, share in enumerate(busy)]
        )
        axes.set_xlim(0.0, (end - begin) / 1e3)
        _draw_legend(figure, stages)
        _save(figure, picture)
    shares = ", ".join(f"stage {stage} busy {share:.0%}" for stage, share in enumerate(busy))
    return f"{picture}: {count} micro-batches in {(end - begin) / 1e6:.2f} s; {shares}"


def _draw_bars(axes: Any, stages: list[list[Slice]], begin: float) -> None:
    for stage, bars in enumerate(stages):
        for start, length, name in bars:
            axes.broken_barh(
                [((start - begin) / 1e3, length / 1e3)],
                (stage - 0.4, 0.8),
                facecolor=_colour(_lane(name)),
                edgecolor="white",
                linewidth=0.8,
                hatch="//" if name[0] == "P" else None,
            )
    axes.set_xlabel("time, ms")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_legend(figure: Any, stages: list[list[Slice]]) -> None:
    from matplotlib.patches import Patch

    names = {name for bars in stages for _, _, name in bars}
    keys = [
        Patch(facecolor=_colour(lane), label=f"lane {lane}")
        for lane in sorted({_lane(name) for name in names})
    ]
    if any(name[0] == "P" for name in names):
        keys.append(Patch(facecolor="0.6", edgecolor="white", hatch="//", label="with prompts"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)


def _save(figure: Any, picture: Path) -> None:
    # a date would make every run of the same trace another file; only svg and pdf hold one
    dated = {".svg": "Date", ".pdf": "CreationDate"}.get(picture.suffix)
    try:
        figure.savefig(picture, dpi=120, metadata={dated: None} if dated else None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dist-int8 bench:plot: plot must be a picture that can be written, got {picture} "
            f"({' '.join(str(error).split())}); write it like timeline.png"
        ) from None


def _read_stages(trace: Path) -> list[list[Slice]]:
    """Returns (start, duration, name) of every slice of every stage, in microseconds."""
    try:
        events = json.loads(trace.read_bytes())["traceEvents"]
        slices: list[dict[str, Any]] = [event for event in events if event["ph"] == "X"]
        num_stages = 1 + max(int(event["tid"]) for event in slices)
        found = [
            [
                (float(event["ts"]), float(event["dur"]), str(event["name"]))
                for event in slices
                if event["tid"] == stage
            ][:MAX_SLICES]
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


def _colour(lane: int) -> str:
    return COLOURS[lane % len(COLOURS)]
