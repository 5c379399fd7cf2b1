"""What benchmarks share: their flags, and a JSON record with all it takes to read it later."""

import argparse
import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch
from gpu.records import commit, is_clean

FOLDER = Path(__file__).parent / "results"


def make_parser(documentation: str) -> argparse.ArgumentParser:
    """A parser with --model (the demo model if not given) and --json."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a checkpoint; default: the demo model")
    parser.add_argument("--json", type=Path, help="file of the figures; default: in results/")
    return parser


def folder_of(args: argparse.Namespace) -> str:
    """The model's folder; fetches and converts the demo model if none was named."""
    if args.model:
        return args.model
    from dist_int8.cli.demo_model import demo_model

    return str(demo_model())


def write_result(name: str, figures: dict[str, Any], path: Path | None = None) -> Path:
    """The figures, device, versions, commit and date in `path`, or in results/<name>.json."""
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
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "clean": is_clean(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "python": platform.python_version(),
        "versions": versions,
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
