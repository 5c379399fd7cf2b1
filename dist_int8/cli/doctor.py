"""Tell what this machine can do: versions, kernels, CPU, GPUs, and what is missing or broken."""

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from dist_int8.distributed.cores import count_cores
from dist_int8.partition.gpus import Gpus, probe

# The dependencies in pyproject.toml that are always imported, with the minimum version (None: any).
REQUIRED = {
    "torch": "2.10",
    "transformers": "5",
    "safetensors": None,
    "pyyaml": None,
    "pydantic": "2",
    "rich": None,
    "tqdm": None,
    "typer": None,
}
# The other packages, with their minimum version and what needs them.
OPTIONAL = {
    "cuda-bindings": (None, "GPUs"),  # installed by cuda-python, imported by partition/gpus
    "accelerate": (None, "the accelerate launcher"),
    "deepspeed": ("0.19.6", "the deepspeed launcher"),
    "protobuf": (None, "tokenizers of SentencePiece"),
    "sentencepiece": (None, "tokenizers of SentencePiece"),
    "gguf": (None, "dist-int8 demo-model"),
}
GIBIBYTE = 1024**3

Verdict = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was examined, what was found, and what to do about it.

    "missing": something optional is absent. "broken": something required does not work.
    """

    name: str
    verdict: Verdict
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """All findings and, for programs that read the JSON, the facts behind them."""

    findings: tuple[Finding, ...]
    gpus: Gpus
    library: dict[str, Any]

    @property
    def broken(self) -> bool:
        return any(finding.verdict == "broken" for finding in self.findings)

    def as_json(self) -> str:
        return json.dumps(
            {
                "ok": not self.broken,
                "findings": [asdict(finding) for finding in self.findings],
                "gpus": [asdict(gpu) for gpu in self.gpus.gpus],
                "library": self.library,
            },
            indent=2,
        )


def examine() -> Report:
    """Examine everything. Never raises: what fails becomes a finding."""
    packages = [_examine_package(name, minimum) for name, minimum in REQUIRED.items()]
    for name, (minimum, user) in OPTIONAL.items():
        needed = name == "cuda-bindings" and _torch_sees_gpu()
        packages.append(_examine_package(name, minimum, None if needed else user))
    library, compiled = _examine_library()
    gpus = probe()
    findings = [
        _examine_python(),
        *packages,
        *compiled,
        _examine_cpu(library),
        *_examine_gpus(gpus),
    ]
    return Report(tuple(findings), gpus, library)


def as_table(report: Report) -> str:
    """Format the findings as text; the last line says whether dist_int8 can run."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found"):
        table.add_column(heading, overflow="fold")
    marks = {"ok": "ok", "missing": "--", "broken": "BROKEN"}
    for finding in report.findings:
        advice = f"; {finding.advice}" if finding.advice else ""
        table.add_row(marks[finding.verdict], finding.name, f"{finding.value}{advice}")
    console = Console(width=100, no_color=True, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table)
    broken = [finding.name for finding in report.findings if finding.verdict == "broken"]
    verdict = f"broken: {', '.join(broken)}" if broken else "dist_int8 can run here"
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join([*lines, verdict])


def _examine_python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _examine_package(name: str, minimum: str | None, user: str | None = None) -> Finding:
    """Compare the installed version with the minimum.

    `user` is what needs an optional package; without it the package is required.
    """
    verdict: Verdict = "missing" if user else "broken"
    use = f" (needed only for {user})" if user else ""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, verdict, f"not installed{use}", f"pip install {name}")
    if minimum is not None and _parse_version(version) < _parse_version(minimum):
        wanted = f"pip install '{name}>={minimum}'"
        return Finding(name, verdict, f"{version}, older than {minimum}{use}", wanted)
    return Finding(name, "ok", version)


def _torch_sees_gpu() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:  # reported as a broken package
        return False


def _parse_version(version: str) -> tuple[int, ...]:
    """Turn 2.13.0+cpu into (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _examine_library() -> tuple[dict[str, Any], list[Finding]]:
    """Ask `ops` about the compiled library. A library that exists must load."""
    try:
        ops = importlib.import_module("dist_int8.int8.ops")
    except Exception as error:
        reason = f"dist_int8.int8.ops is not importable: {_flat(error)}"
        return {}, [Finding("kernels", "broken", reason, "install dist_int8 again")]
    library: dict[str, Any] = ops.library_info()
    if library["path"] is None:
        if importlib.util.find_spec("dist_int8._ops") is None:
            slow = "not compiled; plain torch runs instead, slowly"
            return library, [Finding("kernels", "missing", slow, "make kernels")]
        return library, [Finding("kernels", "broken", _flat(library["error"]), "make kernels")]
    cpu, cuda = library["cpu_ops"], library["cuda_ops"]
    findings = [
        Finding("kernels", "ok", library["path"]),
        Finding("CPU kernels", "ok" if cpu else "broken", ", ".join(cpu) or "none"),
    ]
    if cuda:
        architectures = ", ".join(library["cuda_architectures"])
        findings.append(Finding("CUDA kernels", "ok", f"{', '.join(cuda)} for {architectures}"))
    else:
        advice = "GPUs need them: run make kernels in a checkout, with nvcc"
        findings.append(Finding("CUDA kernels", "missing", "not compiled", advice))
    return library, findings


def _examine_cpu(library: dict[str, Any]) -> Finding:
    num_cores = count_cores()
    instructions = library.get("cpu_instruction_set")
    value = f"{num_cores} cores, {platform.machine()}"
    try:
        import torch

        value += f", torch uses {torch.get_num_threads()} threads"
    except Exception:  # reported as a broken package
        pass
    return Finding("CPU", "ok", f"{value}, kernels use {instructions}" if instructions else value)


def _examine_gpus(gpus: Gpus) -> list[Finding]:
    if not gpus.gpus:
        return [Finding("GPUs", "missing", f"0 ({gpus.reason})", "use --device cpu")]
    findings = [Finding("GPUs", "ok", f"{len(gpus.gpus)}, driver for CUDA {gpus.driver}")]
    for gpu in gpus.gpus:
        major, minor = gpu.compute_capability
        free = "" if gpu.free_bytes is None else f", {gpu.free_bytes / GIBIBYTE:.1f} GiB free"
        peers = ", ".join(map(str, gpu.peers)) or "none"
        findings.append(
            Finding(
                f"cuda:{gpu.index}",
                "ok",
                f"{gpu.name}, {gpu.total_bytes / GIBIBYTE:.1f} GiB{free}, "
                f"compute capability {major}.{minor}, peer access to {peers}",
            )
        )
    try:
        import torch

        if not torch.cuda.is_available():
            seen = f"torch {torch.__version__} cannot use them"
            findings.append(Finding("torch CUDA", "missing", seen, "install a CUDA build of torch"))
    except Exception:  # reported as a broken package
        pass
    return findings


def _flat(error: object) -> str:
    return " ".join(str(error).split())
