"""What benchmarks share: their flags, and a JSON summary with all it takes to read it later."""

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu.records import commit, is_clean

# What a run writes, unless told otherwise; the committed figures in results/ stay as they are.
FOLDER = Path(__file__).parents[1] / "build" / "benchmarks"
# keys whose lists of numbers are samples of one quantity; a result keeps their summary
SAMPLES = {"windows", "row_losses", "errors", "factors"}
_WIDTH = 140


def make_parser(documentation: str, takes_model: bool = True) -> argparse.ArgumentParser:
    """A parser with --json and --raw, and --model (the demo model if not given) if it takes one."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if takes_model:
        parser.add_argument("--model", help="folder of a checkpoint; default: the demo model")
    add_json(parser)
    parser.add_argument(
        "--raw", action="store_true", help="keep every sample instead of medians and quartiles"
    )
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json, the file that `write_result` writes."""
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="file of the figures; default: NAME.json in build/benchmarks. To renew a committed "
        "result, name its file in benchmarks/results",
    )


def folder_of(args: argparse.Namespace) -> str:
    """Returns the model's folder; fetches and converts the demo model if none was named."""
    if args.model:
        return args.model
    from dist_int8.cli.demo_model import demo_model

    return str(demo_model())


def write_result(
    name: str, figures: dict[str, Any], path: Path | None = None, raw: bool = False
) -> Path:
    """Writes figures, command, device, versions, commit and date to `path`.

    Without one, to build/benchmarks/<name>.json, which git ignores.

    Args:
        raw: keep the samples (SAMPLES) instead of their summaries.

    Returns:
        The file that was written.
    """
    path = path or FOLDER / f"{name}.json"
    packages = ("torch", "transformers", "bitsandbytes", "torchao", "lm_eval", "dist_int8")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    record = {
        "benchmark": name,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "clean": is_clean(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "python": platform.python_version(),
        "versions": versions,
        **(figures if raw else summarize(figures)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(format_json(record) + "\n")
    print(f"written: {path}")
    return path


def summarize(value: Any, is_sample: bool = False) -> Any:
    """Replaces lists of samples by count, median and quartiles; rounds floats to six digits."""
    if isinstance(value, dict):
        return {key: summarize(item, is_sample or key in SAMPLES) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if is_sample and len(value) > 1 and all(isinstance(item, int | float) for item in value):
            return _spread(value)
        return [summarize(item, is_sample) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _spread(samples: Sequence[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"samples": len(samples), **summarize({"median": median, "quartiles": [low, high]})}


def format_json(value: Any, depth: int = 0) -> str:
    """JSON with whatever fits into a line on one line."""
    line = json.dumps(value)
    if not isinstance(value, dict | list) or not value or len(line) + 2 * depth <= _WIDTH:
        return line
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(key)}: {format_json(item, depth + 1)}" for key, item in value.items()
        ]
    else:
        parts = [format_json(item, depth + 1) for item in value]
    inside = ",\n".join(f"{'  ' * (depth + 1)}{part}" for part in parts)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inside}\n{'  ' * depth}{closing}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
