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


def test_the_program_runs_by_itself():
    done = run()
    assert done.returncode == 0 and "every op ran" in done.stdout, done.stderr


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_finds_nothing(gpu_only, tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    done = run(sanitizer, "--tool", tool, "--error-exitcode", "9")
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not take this machine's GPU")
    assert done.returncode == 0 and "every op ran" in done.stdout, done.stdout[-4000:]
