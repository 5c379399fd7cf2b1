"""Programs of this folder, compiled once per session."""

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer"]
FOLDERS = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include", "tests/csrc")]

# AVX-512 runs on SIMDe, an emulation of the intrinsics in headers; amx_emulated.h is one of AMX.
SIMDE = Path("/usr/include/simde/x86/avx512/dpbusd.h")
EMULATED = ["-DDIST_INT8_EMULATED", "-include", "avx512_emulated.h"]
DEFINES = {
    "generic": [],
    "avx512_vnni": EMULATED,
    "amx": ["-DDIST_INT8_ISA_avx512_vnni=1", *EMULATED],
}
CPU_FLAGS = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-flax-vector-conversions"]


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
        command = [os.environ.get("CXX", "c++"), *FLAGS, *flags, "-pthread"]
        command += [*FOLDERS, str(ROOT / "tests/csrc" / f"{name}.cpp"), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return program

    return compile


@pytest.fixture(scope="session")
def compile_for_cpu(tmp_path_factory):
    """compile_for_cpu("NAME", isa) -> path of NAME.cpp for one of DEFINES; skips without SIMDe."""

    def compile(name: str, isa: str) -> Path:
        if isa != "generic" and not SIMDE.is_file():
            pytest.skip(f"needs {SIMDE} (apt install libsimde-dev)")
        program = tmp_path_factory.mktemp("csrc") / f"{name}-{isa}"
        defines = [f"-DDIST_INT8_ISA={isa}", f"-DDIST_INT8_ISA_{isa}=1", *DEFINES[isa]]
        source = str(ROOT / "tests/csrc" / f"{name}.cpp")
        command = [os.environ.get("CXX", "c++"), *CPU_FLAGS, *FOLDERS, *defines, source]
        done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return program

    return compile
