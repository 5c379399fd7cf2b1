"""Programs of this folder, compiled once per session."""

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer"]


@pytest.fixture(scope="session")
def compile_program(tmp_path_factory):
    """compile_program("NAME", sanitize="") -> path of the program made from NAME.cpp.

    sanitize: what the compiler's sanitizer looks for, "address" or "thread"; True: "address".
    """

    @cache
    def compile(name: str, sanitize: bool | str = "") -> Path:
        program = tmp_path_factory.mktemp("csrc") / name
        kind = "address" if sanitize is True else sanitize
        flags = [*SANITIZED, f"-fsanitize={kind}"] if kind else ["-O2"]
        folders = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include", "tests/csrc")]
        command = [os.environ.get("CXX", "c++"), *FLAGS, *flags, "-pthread"]
        command += [*folders, str(ROOT / "tests/csrc" / f"{name}.cpp"), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return program

    return compile
