"""Runs tasks of lm-evaluation-harness: scores with their standard errors."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dist_int8.config import syntax_error

if TYPE_CHECKING:
    from dist_int8.api.model import Model
    from dist_int8.config import Settings

SEED = 1234  # of few-shot examples and of bootstraps; the harness's default


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: name of the task.
        metric: name of the metric.
        value: score.
        error: standard error over the documents; None where the harness has none.
        higher_is_better: whether a higher score is better.
        num_documents: number of documents scored.
    """

    task: str
    metric: str
    value: float
    error: float | None
    higher_is_better: bool
    num_documents: int


def run_tasks(
    model: Model | str,
    tasks: list[str],
    *,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bootstrap_iterations: int = 1000,
) -> list[TaskScore]:
    """Scores a model on tasks of the harness.

    Args:
        model: handle, or the folder or hub id of a model to load with the default settings.
        tasks: names of tasks in the folder or, without one, of tasks that come with the harness,
            which fetches their data from the hub.
        task_folder: folder of task files (YAML); their data files are named relative to it.
        limit: maximum number of documents per task; None: all.
        num_fewshot: number of examples before each question, where the task leaves it open.
        bootstrap_iterations: number of iterations for standard errors of metrics that are not
            means; 0: no such errors.

    Raises:
        ValueError: lm-eval is not installed, a task is unknown, or a setting is bad.
        RankError: a rank ended.
    """
    return scores_of(
        evaluate(
            model,
            tasks,
            task_folder=task_folder,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iterations=bootstrap_iterations,
        )
    )


def evaluate(
    model: Any,
    tasks: list[str],
    *,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bootstrap_iterations: int = 1000,
    progress: bool = True,
) -> dict[str, Any]:
    """Returns the harness's results with samples; `model` may also be one of the harness."""
    _require_harness()
    if limit is not None and limit < 1:
        raise ValueError(f"eval: limit must be at least 1 document, got {limit}; leave it out")
    import lm_eval
    from lm_eval.api.model import LM

    from dist_int8.evaluation.harness import PipelineLM

    loaded = _load(tasks, task_folder)
    for task in loaded["tasks"].values():
        given = task.get_config("num_fewshot")
        if given is None or (num_fewshot is not None and given != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    random.seed(SEED)
    torch.manual_seed(SEED)
    with contextlib.ExitStack() as stack:
        if not isinstance(model, LM):
            if isinstance(model, str):
                from dist_int8.api.load import load

                model = stack.enter_context(load(model))
            model = PipelineLM(model, progress=progress)
        if not progress:  # the harness prints its progress
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        return lm_eval.evaluate(
            lm=model, task_dict=loaded, limit=limit, bootstrap_iters=bootstrap_iterations
        )


def scores_of(results: dict[str, Any]) -> list[TaskScore]:
    """Collects the scores in results of the harness, including its groups."""
    scores = []
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, _, filter_name = name.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if filter_name == "none" else name,
                    value=float(value),
                    error=float(error) if isinstance(error, float | int) else None,
                    higher_is_better=bool(results["higher_is_better"][task].get(metric, True)),
                    num_documents=int(metrics.get("sample_len", 0)),
                )
            )
    return scores


def compare_tasks(
    settings: Settings,
    tasks: list[str],
    *,
    reference: str = "fp32",
    task_folder: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores a model with the settings and, for comparison, its weights in floating point.

    Both run through the pipeline, one after the other, so only one is in memory at a time.

    Args:
        settings: settings of the model to score; `model` is set.
        reference: "fp32" or "bf16", or "none" for no comparison.
        tasks, task_folder, limit, num_fewshot: as for `run_tasks`.
        progress: whether to show progress bars.

    Returns:
        model, reference, and `scores` with one entry per metric: task, metric, higher_is_better,
        num_documents, ours, error (standard error over the documents, of the reference if there is
        one), reference, and changed (for an accuracy, how many documents are judged differently).

    Raises:
        ValueError, RankError: as `run_tasks`.
    """
    options = {"limit": limit, "num_fewshot": num_fewshot, "task_folder": task_folder}
    options["progress"] = progress
    _require_harness()
    _load(tasks, task_folder)  # reports bad tasks before a model is loaded
    base = None
    if reference != "none":
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[reference]
        plain: dict[str, Any] = {"int8": False, "dtype": dtype, "calibrate": "off"}
        plain |= dict.fromkeys(("head", "embedding", "kv"), "16bit")
        base = _evaluate_with(settings, plain, tasks, options)
    ours = _evaluate_with(settings, {}, tasks, options)
    rows = _compare_scores(base, ours)
    return {"model": settings.model, "reference": reference, "scores": rows}


def _compare_scores(base: dict[str, Any] | None, ours: dict[str, Any]) -> list[dict[str, Any]]:
    """Pairs our scores with those of the reference, if there is one."""
    by_name = {} if base is None else {(s.task, s.metric): s for s in scores_of(base)}
    rows = []
    for score in scores_of(ours):
        other = by_name.get((score.task, score.metric))
        row = asdict(score) | {"ours": score.value, "reference": None, "changed": None}
        del row["value"]
        if base is not None and other is not None:
            row |= {"reference": other.value, "error": other.error}
            row["changed"] = _num_changed(base, ours, score)
        rows.append(row)
    return rows


def table(values: dict[str, Any]) -> str:
    """Formats what `compare_tasks` returned as text, one line per metric."""
    reference = values["reference"]
    rows: list[tuple[str, ...]] = [
        ("task", "metric", "documents", reference, "ours", "+-", "apart", "changed")
    ]
    for row in values["scores"]:
        known, error = row["reference"] is not None, row["error"]
        apart = f"{abs(row['ours'] - row['reference']) / error:.2f} +-" if known and error else ""
        rows.append(
            (
                row["task"],
                f"{row['metric']} ({'higher' if row['higher_is_better'] else 'lower'} is better)",
                str(row["num_documents"]),
                f"{row['reference']:.4f}" if known else "",
                f"{row['ours']:.4f}",
                "" if error is None else f"{error:.4f}",
                apart,
                "" if row["changed"] is None else str(row["changed"]),
            )
        )
    if reference == "none":
        rows = [row[:3] + row[4:6] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _evaluate_with(
    settings: Settings, changes: dict[str, Any], tasks: list[str], options: dict[str, Any]
) -> dict[str, Any]:
    from dist_int8.api.load import load

    values = settings.model_dump(exclude_none=True) | changes | {"progress": options["progress"]}
    with load(**values) as model:
        return evaluate(model, tasks, **options)


def _num_changed(base: dict[str, Any], ours: dict[str, Any], score: TaskScore) -> int | None:
    """Counts documents whose score of 0 or 1 differs; None for a metric with other scores."""
    metric, _, filter_name = score.metric.partition(",")
    values = []
    for results in (base, ours):
        samples = [
            sample
            for sample in results["samples"].get(score.task, [])
            if sample["filter"] == (filter_name or "none")
        ]
        values.append([sample.get(metric) for sample in samples])
    if not values[0] or not all(value in (0, 1) for value in values[0] + values[1]):
        return None
    return sum(
        bool(one != other) for one, other in zip(*values, strict=True)
    )  # bool() of NumPy's bool_


def _require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "eval: package lm-eval must be installed for --tasks, got none; "
            "pip install 'dist_int8[eval]' (or pip install lm-eval)"
        )


def _unreadable(folder: Path) -> list[str]:
    """Lists task files that are not valid YAML, which the harness skips silently."""
    found = {path.name: syntax_error(path) for path in sorted(folder.glob("*.y*ml"))}
    return [f"{name} cannot be read: {error}" for name, error in found.items() if error]


def _load(names: list[str], task_folder: str | Path | None) -> dict[str, Any]:
    """Loads the tasks with their data."""
    from lm_eval.tasks import TaskManager

    folder = None if task_folder is None else Path(task_folder).resolve()
    if folder is not None and not folder.is_dir():
        raise ValueError(
            f"eval: task_folder must be a folder of task files, got {str(task_folder)!r}; "
            "check the path"
        )
    if not names:
        raise ValueError("eval: tasks must name at least one task, got none; write --tasks NAME")
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        if folder is None:
            where, known = "of the harness", "`lm-eval ls tasks` lists them"
        else:
            where, known = f"of {task_folder}", f"it has {', '.join(manager.all_tasks) or 'none'}"
            known += "".join(f"; {problem}" for problem in _unreadable(folder))
        raise ValueError(f"eval: tasks must be {where}, got {', '.join(unknown)}; {known}")
    # data files are named relative to the task files
    with contextlib.chdir(folder) if folder is not None else contextlib.nullcontext():
        return manager.load(names)
