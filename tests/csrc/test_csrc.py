"""The C++ of the kernels without torch: the shared number formats, and that no torch is needed."""

import os
import re
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
COMPILER = [os.environ.get("CXX", "c++"), "-std=c++17", "-Wall", "-Wextra", "-Werror"]
COMPILER += [f"-I{CSRC}", f"-I{CSRC / 'include'}"]


def run(command, **options):
    done = subprocess.run(command, capture_output=True, **options)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture(scope="module")
def numbers():
    """fp32 of all exponents, ties between neighbours of both formats, the extremes."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64)
    random = bits.to(torch.int32).view(torch.float32)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    brains = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    ties = torch.cat([(v[1:].double() + v[:-1].double()).float() / 2 for v in (halves, brains)])
    return torch.cat([random, halves, brains, ties])


def test_number_formats_equal_torch(tmp_path, numbers):
    program = tmp_path / "numeric"
    source = Path(__file__).with_name("numeric.cpp")
    run([*COMPILER, "-O1", "-ffp-contract=off", str(source), "-o", str(program)])
    data = run([str(program)], input=numbers.numpy().tobytes())
    count, at = len(numbers), 0

    def take(dtype, length):
        nonlocal at
        part = numpy.frombuffer(data, dtype, length, at)
        at += part.nbytes
        return torch.from_numpy(part.copy())

    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for format in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(
            take("f4", 65536), every.view(format).float(), rtol=0, atol=0, equal_nan=True
        )
    for format in (torch.float16, torch.bfloat16):
        got = take("i2", count).view(format)
        torch.testing.assert_close(got, numbers.to(format), rtol=0, atol=0, equal_nan=True)
    rounded = take("f4", count)
    small = numbers.abs() < 2**22
    assert torch.equal(rounded[small], numbers[small].round())


@pytest.mark.parametrize("source", sorted(path.name for path in (CSRC / "cpu").glob("*.cpp")))
def test_cpu_kernels_compile_without_torch(source, tmp_path):
    flags = ["-O0", "-DDIST_INT8_ISA=generic", "-DDIST_INT8_ISA_generic=1", "-fsyntax-only"]
    run([*COMPILER, *flags, str(CSRC / "cpu" / source)])


def test_device_code_and_headers_know_no_torch():
    for folder in ("include", "cpu", "cuda"):
        for path in (CSRC / folder).rglob("*.*"):
            assert "#include <torch" not in path.read_text(), path


def test_no_include_runs_upwards():
    """ops -> cpu_kernels.h, cuda_kernels.h -> the rest of the contract; kernels know no op."""
    allowed = {
        "include": {"dist_int8"},
        "cpu": {"dist_int8", "cpu", "amx_emulated.h"},
        "cuda": {"dist_int8", "cuda", "emulator.h"},
        "ops": {"dist_int8", "ops"},
    }
    for folder, rooms in allowed.items():
        for path in (CSRC / folder).rglob("*.*"):
            for included in re.findall(r'^#include "([^"/]+)', path.read_text(), re.MULTILINE):
                assert included in rooms, f"{path} includes {included}"


def test_every_op_has_one_schema_and_one_source():
    schemas = (CSRC / "ops/schema.cpp").read_text()
    for path in (CSRC / "cpu").glob("*.cpp"):
        if path.stem not in ("dispatch", "table"):
            assert schemas.count(f'"{path.stem}(') == 1, path.stem
