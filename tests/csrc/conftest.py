"""Programs of this folder, compiled once per session."""

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address"]


@pytest.fixture(scope="session")
def compile_program(tmp_path_factory):
    """compile_program("NAME", sanitize=False) -> path of the program made from NAME.cpp."""

    @cache
    def compile(name: str, sanitize: bool = False) -> Path:
        program = tmp_path_factory.mktemp("csrc") / name
        folders = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include", "tests/csrc")]
        command = [os.environ.get("CXX", "c++"), *FLAGS, *(SANITIZED if sanitize else ["-O2"])]
        command += [*folders, str(ROOT / "tests/csrc" / f"{name}.cpp"), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return program

    return compile
