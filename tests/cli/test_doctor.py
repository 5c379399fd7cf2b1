"""doctor: tells what is there, and exits 1 only when something required is broken."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dist_int8.cli import doctor

ROOT = Path(__file__).parents[2]


def run_doctor(*flags, before=""):
    """doctor in a process of its own, after running some code in it."""
    code = f"{before}\nfrom dist_int8.cli.app import main\nmain(['doctor', *{list(flags)!r}])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_table_of_a_working_installation():
    answer = run_doctor()
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for name in ("python", "torch", "transformers", "deepspeed", "kernels", "CPU", "GPUs"):
        assert any(name in line.split() for line in answer.stdout.splitlines()), name
    assert answer.stdout.splitlines()[-1] == "dist_int8 can run here"
    assert answer.stderr == ""


def test_json_says_the_same():
    answer = run_doctor("--json")
    report = json.loads(answer.stdout)
    assert report["ok"] is True
    verdicts = {finding["name"]: finding["verdict"] for finding in report["findings"]}
    assert verdicts["torch"] == "ok" and set(verdicts.values()) <= {"ok", "missing"}
    assert report["library"]["cpu_instruction_set"] in ("avx512_vnni", "avx2", "generic", None)


OLD_TORCH = """
import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: "2.9.1+cu128" if name == "torch" else real(name)
"""
NO_PACKAGE = """
import importlib.metadata
real = importlib.metadata.version
def version(name):
    if name == "accelerate":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
"""
# A library file that is not one, found before the real one.
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
        (NO_PACKAGE, "accelerate", "not installed"),
        (DAMAGED_LIBRARY, "kernels", "_ops.so did not load"),
    ],
)
def test_what_is_broken_is_named_and_exits_1(before, name, said):
    answer = run_doctor(before=before)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert answer.stdout.splitlines()[-1] == f"broken: {name}"
    assert said in " ".join(answer.stdout.split())


def test_no_library_is_slow_but_not_broken():
    answer = run_doctor("--json", before=NO_LIBRARY)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    findings = {finding["name"]: finding for finding in json.loads(answer.stdout)["findings"]}
    assert findings["kernels"]["verdict"] == "missing"
    assert "plain torch" in findings["kernels"]["value"]


def test_packages_are_those_of_pyproject():
    """cuda-python is there for cuda-bindings, which is imported; deepspeed is only a launcher."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    looked_at = {**doctor.REQUIRED, "deepspeed": doctor.OPTIONAL["deepspeed"][0]}
    found = {name if least is None else f"{name}>={least}" for name, least in looked_at.items()}
    assert found - {"cuda-bindings"} == set(project["dependencies"]) - {"cuda-python"}


NO_LAUNCHER = """
import importlib.metadata
real = importlib.metadata.version
def version(name):
    if name in ("deepspeed", "cuda-python"):
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
"""


def test_what_is_not_imported_stops_nothing():
    answer = run_doctor(before=NO_LAUNCHER)
    assert answer.returncode == 0, answer.stdout
    assert "the deepspeed launcher needs it" in " ".join(answer.stdout.split())
