"""An evaluation as a picture: methods side by side, and a map of the outlier features."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dist_int8.evaluation.evaluate import Evaluation
from dist_int8.evaluation.layers import Inputs, LayerReport
from dist_int8.evaluation.methods import METHODS

_OURS, _OTHERS, _REFERENCE = "C0", "0.7", "black"


def check_picture(picture: Path) -> None:
    """Raises ValueError, before anything is measured, where nothing could be drawn there."""
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
    """Draws into `picture`, in the format that its ending names (png, svg, pdf).

    On top the methods: perplexity with its change against the reference, and KL divergence. Below,
    where layers were looked at, the outlier map: a column for each kind of linear, its image a line
    a block and a column a feature (the largest magnitude, in units of the rows' RMS), under it how
    many features a block reach 6.0 in 6% of the tokens.

    Raises:
        ValueError: matplotlib is not installed, or the file cannot be written.
    """
    check_picture(picture)
    from matplotlib.figure import Figure

    kinds = _kinds(found.layers)
    figure = Figure(
        figsize=(max(12.0, 4.0 * len(kinds)), 1.5 + 0.35 * len(found.scores) + 6.0 * bool(kinds)),
        layout="constrained",
    )
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
    from matplotlib.ticker import NullFormatter

    base = found.base
    names = list(found.scores)
    colours = [
        _REFERENCE if name not in METHODS else _OURS if METHODS[name].in_runtime else _OTHERS
        for name in names
    ]
    panels = part.subplots(1, 2 if base else 1, sharey=True, squeeze=False)[0]
    perplexities = [found.scores[name].perplexity for name in names]
    errors = [found.scores[name].perplexity_error or 0.0 for name in names]
    if base is not None:  # the spread of the text itself falls out of a comparison
        changes = [found.scores[name].change_percent(base) for name in names]
        errors = [base.perplexity * (error or 0.0) / 100 for _, error in changes]
    panels[0].barh(names, perplexities, xerr=errors, color=colours)
    pairs = zip(perplexities, errors, strict=True)
    ends = [(value - error, value + error) for value, error in pairs if math.isfinite(value)]
    low = min((least for least, _ in ends), default=0.0)
    high = max((most for _, most in ends), default=0.0)
    if base is not None and 0 < high < 2 * base.perplexity:
        # bars that begin at 0 would all look alike
        panels[0].set_xlim(low - 0.1 * (high - low) - 1e-3, high + 0.25 * (high - low) + 1e-3)
        panels[0].axvline(base.perplexity, color=_REFERENCE, linewidth=0.8)
        for row, (change, _) in enumerate(changes):
            panels[0].annotate(
                f" {change:+.2f}%", (perplexities[row] + errors[row], row), va="center"
            )
    elif high > 10 * low:
        panels[0].set_xscale("log")
    panels[0].set_xlabel("perplexity (the axis does not begin at 0)")
    panels[0].invert_yaxis()
    if base is not None:
        means = [
            (0.0, None) if scores is base else scores.mean_divergence
            for scores in found.scores.values()
        ]
        panels[1].barh(
            names,
            [mean for mean, _ in means],
            xerr=[error or 0.0 for _, error in means],
            color=colours,
        )
        if any(mean > 0 for mean, _ in means):
            panels[1].set_xscale("log")
            panels[1].xaxis.set_minor_formatter(NullFormatter())
        panels[1].set_xlabel(f"KL divergence to {found.asked.reference}, nats a token")
    part.suptitle(
        f"{sum(next(iter(found.scores.values())).num_targets)} tokens, window "
        f"{found.asked.window}, stride {found.asked.stride}; in the runtime blue, in transformers "
        "grey"
    )


def _kinds(layers: LayerReport | None) -> dict[str, list[Inputs]]:
    """Inputs of every block by the kind of the linear that reads them (its name in a block)."""
    kinds: dict[str, list[Inputs]] = {}
    for inputs in layers.inputs if layers else ():
        kinds.setdefault(inputs.names[0].rpartition(".")[2], []).append(inputs)
    # an image needs lines of one length
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
        counts[column].bar(range(len(blocks)), [len(b.outlier_features) for b in blocks])
        counts[column].set_xlabel("block")
        counts[column].xaxis.set_major_locator(MaxNLocator(integer=True))
    part.colorbar(image, ax=list(maps), label="log2(largest magnitude / RMS)")
    maps[0].set_ylabel("block")
    counts[0].set_ylabel("features >= 6.0")
