"""The compile report: what it reads from ptxas, and what it objects to."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[2] / "csrc/tools"


def module(name):
    spec = importlib.util.spec_from_file_location(f"csrc_{name}", REPORT / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # a dataclass looks for its module
    spec.loader.exec_module(loaded)
    return loaded


report = module("report")

OURS = "_ZN9dist_int812_GLOBAL__N_120quantize_rows_kernelIfEEvNS_16QuantizeRowsArgsE"
LOG = f"""\
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '{OURS}' for 'sm_80'
ptxas info    : Function properties for {OURS}
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Compile time = 12.5 ms
ptxas info    : Compiling entry function '{OURS}' for 'sm_90a'
ptxas info    : Function properties for {OURS}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
"""
SERIAL = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    f"serialized due to a function call in the function '{OURS}'\n"
)
READABLE = {
    OURS: "void dist_int8::(anonymous namespace)::quantize_rows_kernel<float>"
    "(dist_int8::QuantizeRowsArgs)"
}
GEMM = report.Kernel("sm_80", "int8_gemm 128x128x64", True, 200, 0, 0)


def recorded(**figures):
    limits = {"registers": 200, "stack": 0, "spills": 0} | figures
    return {"sm_80": {GEMM.name: limits}}


def test_reads_every_kernel_of_every_architecture():
    first, second = report.parse(LOG, "CMakeFiles/cuda_kernels.dir/rows.cu.o.log", READABLE)
    assert first == report.Kernel("sm_80", "quantize_rows_kernel<float>", False, 40, 16, 20)
    assert second == report.Kernel("sm_90a", "quantize_rows_kernel<float>", False, 32, 0, 0)


def test_a_kernel_of_ours_may_not_spill():
    kernels = report.parse(LOG, "rows.cu.o.log", READABLE)
    (problem,) = report.problems(kernels, recorded())
    assert re.search(r"sm_80 quantize_rows_kernel<float>: .* must not spill, got 20", problem)


def test_serialized_wgmma_is_a_problem():
    kernels = report.parse(SERIAL + LOG, "int8_gemm_sm90a.dir/x.cu.o.log", READABLE)
    assert [kernel.remark for kernel in kernels] == ["C7510", "C7510"]
    assert any("wgmma in flight" in problem for problem in report.problems(kernels, {}))


@pytest.mark.parametrize(
    ("symbol", "tile"),
    [
        (
            "void cutlass::Kernel2<cutlass::gemm::kernel::DefaultGemmWithVisitor<signed char, "
            "cutlass::gemm::GemmShape<128, 256, 64>, cutlass::gemm::GemmShape<64, 64, 64> > >",
            "128x256x64",
        ),
        (
            "MainloopSm90TmaGmmaWarpSpecialized<6, cute::tuple<cute::C<2>, cute::C<1>, cute::C<1> "
            ">, cutlass::gemm::KernelTmaWarpSpecializedPingpong>, cute::tuple<cute::C<128>, "
            "cute::C<128>, cute::C<128> >, signed char",
            "128x128x128",
        ),
    ],
)
def test_a_cutlass_kernel_is_named_by_its_tile(symbol, tile):
    log = LOG.replace(OURS, "_Z4name")
    path = "CMakeFiles/int8_gemm_sm80.dir/csrc/cuda/cutlass/int8_gemm_sm80.cu.o.log"
    kernel, _ = report.parse(log, path, {"_Z4name": symbol})
    assert kernel.is_cutlass and kernel.name == f"int8_gemm {tile}"


def test_a_cutlass_kernel_may_not_grow():
    assert report.problems([GEMM], recorded()) == []
    assert report.problems([replace(GEMM, registers=190)], recorded()) == []
    for key in ("registers", "stack", "spills"):
        (problem,) = report.problems([replace(GEMM, **{key: 255})], recorded())
        assert f"{key} must be at most" in problem and "got 255" in problem
    (problem,) = report.problems([replace(GEMM, name="int8_gemm 1x1x1")], recorded())
    assert "has no recorded figure" in problem


def test_the_table_has_one_line_per_kernel():
    lines = report.table([GEMM, replace(GEMM, architecture="sm_90a")]).splitlines()
    assert len(lines) == 3 and lines[1].split() == ["sm_80", "200", "0", "0", *GEMM.name.split()]


def test_figures_are_recorded_for_every_compiled_tile():
    figures = json.loads((REPORT / "figures.json").read_text())
    tiles = (REPORT.parent / "include/dist_int8/gemm_tiles.h").read_text()
    for number, architecture in (("80", "sm_80"), ("90", "sm_90a")):
        names = set(figures["kernels"][architecture])
        compiled = re.findall(rf"^  kSm{number}_(\w+),", tiles, re.MULTILINE)
        assert {f"int8_gemm {tile}" for tile in compiled} == names


def test_the_compiler_output_is_kept_beside_the_object(tmp_path):
    target = tmp_path / "x.cu.o"
    command = [sys.executable, "-c", "print('ptxas info'); print('a warning')", "-o", str(target)]
    done = subprocess.run(
        [sys.executable, str(REPORT / "record.py"), *command], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "a warning\n"
    first, *rest = Path(f"{target}.log").read_text().splitlines()
    assert re.fullmatch(r"\d+\.\d seconds", first) and rest == ["ptxas info", "a warning"]


def test_the_output_of_a_failing_compiler_is_printed(tmp_path):
    command = [sys.executable, "-c", "print('error: no'); raise SystemExit(3)", "-o", "x.o"]
    done = subprocess.run(
        [sys.executable, str(REPORT / "record.py"), *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 3 and "error: no" in done.stdout and not list(tmp_path.iterdir())


def test_says_so_without_nvcc(tmp_path):
    command = [sys.executable, str(REPORT / "report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode == 0 and "no nvcc" in done.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_an_empty_build_folder_is_not_a_pass(tmp_path):
    command = [sys.executable, str(REPORT / "report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "run make kernels first" in done.stdout
