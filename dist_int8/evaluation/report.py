"""Formats an evaluation as a table and as JSON."""

import math
from collections.abc import Sequence
from typing import Any

from dist_int8.evaluation.evaluate import Evaluation
from dist_int8.evaluation.methods import METHODS
from dist_int8.evaluation.perplexity import Scores

_HEADS = (
    "method",
    "in",
    "perplexity",
    "change, %",
    "KL, 1e-3 nats",
    "agreement, %",
    "layer error, %",
    "tokens/s",
)


def as_dict(found: Evaluation) -> dict[str, Any]:
    """Returns all figures; those that are not finite or were not measured are None."""
    asked = found.asked
    num_targets = next(iter(found.scores.values())).num_targets
    values: dict[str, Any] = {
        "num_tokens": found.num_tokens,
        "num_targets": sum(num_targets),
        "window": asked.window,
        "stride": asked.stride,
        "batch": asked.batch,
        "reference": asked.reference,
        "methods": {name: _method(found, name) for name in found.scores},
    }
    if found.layers is not None:
        values["layer_errors"] = found.layers.errors
        values["inputs"] = [inputs.as_dict() for inputs in found.layers.inputs]
    return _finite(values)


def _method(found: Evaluation, name: str) -> dict[str, Any]:
    scores, base = found.scores[name], found.base
    method = METHODS.get(name)
    values: dict[str, Any] = {
        "title": method.title if method else f"{name}, floating point",
        "where": method.where if method else "runtime",
        "perplexity": scores.perplexity,
        "perplexity_error": scores.perplexity_error,
    }
    if base is not None and scores is not base:
        change, change_error = scores.change_percent(base)
        divergence, divergence_error = scores.mean_divergence
        values |= {
            "change_percent": change,
            "change_percent_error": change_error,
            "divergence": divergence,
            "divergence_error": divergence_error,
            # an argmax over NaN would agree with another one
            "agreement_percent": scores.agreement_percent if math.isfinite(divergence) else None,
        }
    if found.layers is not None and name in found.layers.errors:
        values["layer_error"] = found.layers.summary(name)
    values["tokens_per_s"] = _speed(found, scores)
    values["windows"] = {
        "num_targets": scores.num_targets,
        "loss": scores.loss,
        "divergence": scores.divergence,
        "agreeing": scores.agreeing,
    }
    return values


def table(values: dict[str, Any]) -> str:
    """Formats the figures of `as_dict` in columns, one line per method."""
    rows = [_HEADS, *(_row(method) for method in values["methods"].values())]
    used = [i for i in range(len(_HEADS)) if any(row[i] for row in rows[1:])]
    rows = [tuple(row[i] for i in used) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(used))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merges several `as_dict` of the same text and model with different methods."""
    values = dict(parts[0])
    for key in ("methods", "layer_errors"):
        if key in values:
            values[key] = {name: found for part in parts for name, found in part[key].items()}
    return values


def summary(values: dict[str, Any]) -> str:
    """Says in a few lines what was measured and how to read the columns."""
    lines = [
        f"{values['num_targets']} tokens of {values['text']}, each predicted once; window "
        f"{values['window']}, stride {values['stride']}; +- is the standard error over the windows"
    ]
    if values["reference"] != "none":
        lines.append(f"change, KL and agreement: against the {values['reference']} model")
    if "inputs" in values:
        counts = [inputs["num_outlier_features"] for inputs in values["inputs"]]
        largest = max(
            (inputs for inputs in values["inputs"]),
            key=lambda inputs: inputs["largest"][0]["times_rms"],
        )
        first = largest["largest"][0]
        lines.append(
            f"outlier features (at least 6.0 in at least 6% of the tokens): {sum(counts)} in "
            f"{sum(count > 0 for count in counts)} of {len(counts)} inputs; the largest magnitude "
            f"is {first['times_rms']:.0f} times the RMS, feature {first['feature']} of "
            f"{largest['linears'][0]}"
        )
    if values["outlier_features_seed"] is not None:
        lines.append(f"with outlier features injected, seed {values['outlier_features_seed']}")
    return "\n".join(lines)


def markdown(columns: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Formats the change of perplexity by method, one column per evaluation (of `as_dict`)."""
    names = list(dict.fromkeys(name for _, values in columns for name in values["methods"]))
    lines = [
        f"| method | {' | '.join(heading for heading, _ in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in names:
        found = [values["methods"].get(name) for _, values in columns]
        title = next(method["title"] for method in found if method)
        lines.append(f"| {title} | {' | '.join(_cell(method) for method in found)} |")
    return "\n".join(lines)


def _cell(method: dict[str, Any] | None) -> str:
    if method is None:
        return ""
    if method.get("change_percent") is None:
        return _plus_minus(method["perplexity"], method["perplexity_error"], 3)
    change = _plus_minus(method["change_percent"], method["change_percent_error"], 2, sign=True)
    return f"{change}; {1000 * method['divergence']:.2f}; {method['agreement_percent']:.2f}"


def _row(method: dict[str, Any]) -> tuple[str, ...]:
    error = method.get("layer_error")
    change = method.get("change_percent")
    divergence = method.get("divergence")
    spread = method.get("divergence_error")
    agreement = method.get("agreement_percent")
    return (
        method["title"],
        method["where"],
        _plus_minus(method["perplexity"], method["perplexity_error"], 3),
        "" if change is None else _plus_minus(change, method["change_percent_error"], 2, sign=True),
        ""
        if divergence is None
        else _plus_minus(1000 * divergence, None if spread is None else 1000 * spread, 2),
        "" if agreement is None else f"{agreement:.2f}",
        f"{100 * error['median']:.2f} (worst {100 * error['worst']:.1f})" if error else "",
        f"{method['tokens_per_s']:.0f}",
    )


def _plus_minus(value: float | None, error: float | None, digits: int, sign: bool = False) -> str:
    if value is None:
        return "not finite"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text if error is None else f"{text} +- {error:.{digits}f}"


def _speed(found: Evaluation, scores: Scores) -> float:
    """Computes input tokens per second, counting tokens of overlapping windows repeatedly."""
    asked = found.asked
    num_inputs = sum(scores.num_targets) + (asked.window - asked.stride) * (
        len(scores.num_targets) - 1
    )
    return num_inputs / max(scores.seconds, 1e-9)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
