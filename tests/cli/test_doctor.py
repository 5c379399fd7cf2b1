"""`dist-int8 doctor`: what it reports, and exit status 1 only when something required is broken."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dist_int8.cli import doctor

ROOT = Path(__file__).parents[2]


def run_doctor(*flags, before=""):
    """Run doctor in its own process, after the code in `before`."""
    code = f"{before}\nfrom dist_int8.cli.app import main\nmain(['doctor', *{list(flags)!r}])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_table_of_a_working_installation():
    answer = run_doctor()
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for name in ("python", "torch", "transformers", "deepspeed", "kernels", "CPU", "GPUs"):
        assert any(name in line.split() for line in answer.stdout.splitlines()), name
    assert answer.stdout.splitlines()[-1] == "dist_int8 can run here"
    assert answer.stderr == ""


def test_json_reports_the_same_findings():
    answer = run_doctor("--json")
    report = json.loads(answer.stdout)
    assert report["ok"] is True
    verdicts = {finding["name"]: finding["verdict"] for finding in report["findings"]}
    assert verdicts["torch"] == "ok" and set(verdicts.values()) <= {"ok", "missing"}
    assert report["library"]["cpu_instruction_set"] in (
        "amx",
        "avx512_vnni",
        "avx2",
        "generic",
        None,
    )


OLD_TORCH = """
import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: "2.9.1+cu128" if name == "torch" else real(name)
"""
NO_PACKAGE = """
import importlib.metadata
real = importlib.metadata.version
def version(name):
    if name == "safetensors":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
"""
# A file that is no library is found instead of the real one.
DAMAGED_LIBRARY = """
import importlib.util, importlib.machinery, pathlib, tempfile
file = pathlib.Path(tempfile.mkdtemp()) / "_ops.so"
file.write_bytes(b"not a library")
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    importlib.machinery.ModuleSpec(name, None, origin=str(file))
    if name == "dist_int8._ops" else real(name, *rest)
)
"""
NO_LIBRARY = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    None if name == "dist_int8._ops" else real(name, *rest)
)
"""


@pytest.mark.parametrize(
    ("before", "name", "said"),
    [
        (OLD_TORCH, "torch", "2.9.1+cu128, older than 2.10"),
        (NO_PACKAGE, "safetensors", "not installed"),
        (DAMAGED_LIBRARY, "kernels", "_ops.so did not load"),
    ],
)
def test_broken_requirement_is_named_and_exits_1(before, name, said):
    answer = run_doctor(before=before)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert answer.stdout.splitlines()[-1] == f"broken: {name}"
    assert said in " ".join(answer.stdout.split())


def test_missing_library_is_not_broken():
    answer = run_doctor("--json", before=NO_LIBRARY)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    findings = {finding["name"]: finding for finding in json.loads(answer.stdout)["findings"]}
    assert findings["kernels"]["verdict"] == "missing"
    assert "plain torch" in findings["kernels"]["value"]


def test_examined_packages_are_those_of_pyproject():
    """cuda-python stands for cuda-bindings, the part of it that is imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    examined = {name: minimum for name, (minimum, _) in doctor.OPTIONAL.items() if name != "gguf"}
    examined |= doctor.REQUIRED
    found = {name if least is None else f"{name}>={least}" for name, least in examined.items()}
    assert found - {"cuda-bindings"} == set(project["dependencies"]) - {"cuda-python"}


# Neither import nor metadata finds deepspeed and cuda-python, with everything it installs.
WITHOUT_DEEPSPEED_AND_CUDA_PYTHON = """
import importlib.metadata, sys
class Blocker:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("cuda", "deepspeed"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
real = importlib.metadata.version
def version(name):
    if name.split("-")[0] in ("cuda", "deepspeed"):
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
"""
TORCH_SEES_A_GPU = """
import torch
torch.cuda.is_available = lambda: True
"""


def test_missing_deepspeed_and_cuda_python_are_not_broken():
    answer = run_doctor("--json", before=WITHOUT_DEEPSPEED_AND_CUDA_PYTHON)
    assert answer.returncode == 0, answer.stdout
    findings = {finding["name"]: finding for finding in json.loads(answer.stdout)["findings"]}
    for name, user in {"deepspeed": "the deepspeed launcher", "cuda-bindings": "GPUs"}.items():
        assert findings[name]["verdict"] == "missing"
        assert findings[name]["value"] == f"not installed (needed only for {user})"
        assert findings[name]["advice"] == f"pip install {name}"


def test_missing_cuda_bindings_are_broken_where_there_is_a_gpu():
    answer = run_doctor(before=WITHOUT_DEEPSPEED_AND_CUDA_PYTHON + TORCH_SEES_A_GPU)
    assert answer.returncode == 1, answer.stdout
    assert answer.stdout.splitlines()[-1] == "broken: cuda-bindings"
