"""An evaluation as a picture: methods side by side, and a map of the outlier features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_int8.evaluation.evaluate import Evaluation
from dist_int8.evaluation.layers import Inputs, LayerReport
from dist_int8.evaluation.methods import METHODS

_OURS, _OTHERS, _REFERENCE = "#2f6db3", "#b4b4b4", "#303030"
_STYLE: Any = {
    "font.size": 13,
    "figure.titlesize": 17,
    "figure.titleweight": "bold",
    "axes.titlesize": 14,
    "savefig.facecolor": "white",  # readable on a dark page too
}


def check_picture(picture: Path) -> None:
    """Raises ValueError, before anything is measured, if `picture` cannot be drawn."""
    reason = None
    if picture.suffix not in (".png", ".svg", ".pdf"):
        reason = "another ending"
    elif picture.is_dir() or not picture.parent.is_dir():
        reason = "a folder" if picture.is_dir() else "no such folder"
    if reason is not None:
        raise ValueError(
            f"dist-int8 eval:plot: plot must be a picture that can be written, got "
            f"{str(picture)!r} ({reason}); write outliers.png, .svg or .pdf"
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError(
            "dist-int8 eval:plot: matplotlib must be installed, got none; "
            'pip install "dist_int8[plot]"'
        ) from None


def draw(found: Evaluation, picture: Path) -> None:
    """Draws into `picture`, in the format given by its suffix (png, svg, pdf).

    On top the methods: perplexity with its change against the reference, and KL divergence. Below,
    if layers were measured, the outlier map: one column per kind of linear, whose image has one row
    per block and one column per feature (the largest magnitude, in units of the rows' RMS), above
    the number of features of each block that reach 6.0 in 6% of the tokens.

    Raises:
        ValueError: matplotlib is not installed, or the file cannot be written.
    """
    check_picture(picture)
    import matplotlib
    from matplotlib.figure import Figure

    kinds = _kinds(found.layers)
    height = 2.0 + 0.45 * len(found.scores) + 6.5 * bool(kinds)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(13.0, 4.0 * len(kinds)), height), layout="constrained")
        top, *below = figure.subfigures(1 + bool(kinds), 1, squeeze=False)[:, 0]
        _draw_methods(found, top)
        if below:
            _draw_map(kinds, below[0])
        try:
            figure.savefig(picture, dpi=120)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"dist-int8 eval:plot: plot must be a picture that can be written, got "
                f"{str(picture)!r} ({error}); write outliers.png, .svg or .pdf"
            ) from None


def _draw_methods(found: Evaluation, part: Any) -> None:
    from matplotlib.patches import Patch

    panels = part.subplots(1, 2 if found.base else 1, sharey=True, squeeze=False)[0]
    _draw_perplexities(found, panels[0])
    if found.base is not None:
        _draw_divergences(found, panels[1])
    panels[0].invert_yaxis()
    for axes in panels:
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    num_tokens = sum(next(iter(found.scores.values())).num_targets)
    part.suptitle(
        f"Perplexity by method: {num_tokens:,} tokens, window {found.asked.window}, "
        f"stride {found.asked.stride}"
    )
    labels = {_OURS: "in the runtime", _OTHERS: "in transformers"}
    keys = [Patch(color=colour, label=labels[colour]) for colour in labels]
    part.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)


def _draw_perplexities(found: Evaluation, axes: Any) -> None:
    base, names = found.base, list(found.scores)
    perplexities = [found.scores[name].perplexity for name in names]
    errors = [found.scores[name].perplexity_error or 0.0 for name in names]
    if base is not None:  # the spread of the text itself cancels out in a comparison
        changes = [found.scores[name].change_percent(base) for name in names]
        errors = [base.perplexity * (error or 0.0) / 100 for _, error in changes]
    axes.barh(names, perplexities, xerr=errors, color=_colours(names))
    pairs = zip(perplexities, errors, strict=True)
    ends = [(value - error, value + error) for value, error in pairs if math.isfinite(value)]
    low = min((least for least, _ in ends), default=0.0)
    high = max((most for _, most in ends), default=0.0)
    axes.set_xlabel("perplexity")
    if base is not None and 0 < high < 2 * base.perplexity:
        # bars that begin at 0 would all look alike
        axes.set_xlim(low - 0.1 * (high - low) - 1e-3, high + 0.25 * (high - low) + 1e-3)
        axes.axvline(base.perplexity, color=_REFERENCE, linewidth=0.8)
        axes.set_xlabel("perplexity (the axis does not begin at 0)")
        for row, (change, _) in enumerate(changes):
            axes.annotate(f"  {change:+.2f}%", (perplexities[row] + errors[row], row), va="center")
    elif high > 10 * low:
        axes.set_xscale("log")


def _draw_divergences(found: Evaluation, axes: Any) -> None:
    from matplotlib.ticker import NullFormatter

    scores = found.scores.values()
    means = [(0.0, None) if one is found.base else one.mean_divergence for one in scores]
    names = list(found.scores)
    errors = [error or 0.0 for _, error in means]
    axes.barh(names, [mean for mean, _ in means], xerr=errors, color=_colours(names))
    if any(mean > 0 for mean, _ in means):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"KL divergence to {found.asked.reference}, nats per token")


def _colours(names: Sequence[str]) -> list[str]:
    return [
        _REFERENCE if name not in METHODS else _OURS if METHODS[name].in_runtime else _OTHERS
        for name in names
    ]


def _kinds(layers: LayerReport | None) -> dict[str, list[Inputs]]:
    """Groups the inputs of every block by the kind of linear that reads them (its name there)."""
    kinds: dict[str, list[Inputs]] = {}
    for inputs in layers.inputs if layers else ():
        kinds.setdefault(inputs.names[0].rpartition(".")[2], []).append(inputs)
    # an image needs rows of one length
    return {
        kind: blocks for kind, blocks in kinds.items() if len({len(b.absmax) for b in blocks}) == 1
    }


def _draw_map(kinds: dict[str, list[Inputs]], part: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    maps, counts = part.subplots(2, len(kinds), squeeze=False, height_ratios=[3, 1])
    highest = max(inputs.ratio.max().item() for blocks in kinds.values() for inputs in blocks)
    for column, (kind, blocks) in enumerate(kinds.items()):
        image = maps[column].imshow(
            [inputs.ratio.clamp(min=1.0).log2().tolist() for inputs in blocks],
            aspect="auto",
            interpolation="nearest",
            vmin=0.0,
            vmax=math.log2(max(highest, 2.0)),
            cmap="magma",
        )
        maps[column].set_title(f"input of {kind}")
        maps[column].set_xlabel("feature")
        maps[column].yaxis.set_major_locator(MaxNLocator(integer=True))
        counts[column].bar(
            range(len(blocks)), [len(b.outlier_features) for b in blocks], color=_OURS
        )
        counts[column].set_xlabel("block")
        counts[column].xaxis.set_major_locator(MaxNLocator(integer=True))
    part.colorbar(image, ax=list(maps), label="log2(largest magnitude / RMS)")
    maps[0].set_ylabel("block")
    counts[0].set_ylabel("outliers")
    part.suptitle("Outlier features: largest magnitude, and features that reach 6.0")
