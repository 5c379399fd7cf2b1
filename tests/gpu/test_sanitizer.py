"""compute-sanitizer over every op on small shapes, where it is installed and takes this GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("sanitized.py")
ROOT = Path(__file__).parents[2]


def run(*command):
    # without torch's pool a buffer ends where the tensor ends
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    return subprocess.run(
        [*command, sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment
    )


def test_sanitized_program_runs_without_the_sanitizer():
    done = run()
    assert done.returncode == 0 and "every op ran" in done.stdout, done.stderr


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_finds_nothing(gpu_only, tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    # torch and cuda-bindings try calls that may fail: those are no errors of a kernel
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    command += ["--report-api-errors", "no"] * (tool == "memcheck")
    done = run(*command)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not take this machine's GPU")
    said = done.stdout + done.stderr
    good = done.returncode == 0 and "every op ran" in done.stdout
    assert good, f"status {done.returncode}: {said[:1500]} ... {said[-400:]}"
