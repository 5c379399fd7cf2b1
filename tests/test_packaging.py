"""The wheel of `make wheel`: its tag, what it holds, and that it runs without this checkout.

`make test-wheel` builds it and names it in DIST_INT8_WHEEL; without it these tests are skipped.
"""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

WHEEL = os.environ.get("DIST_INT8_WHEEL")
pytestmark = pytest.mark.skipif(not WHEEL, reason="DIST_INT8_WHEEL is not set; run make test-wheel")
COMPILERS = ("cc", "gcc", "c++", "g++", "clang", "nvcc", "make", "cmake", "ninja")


@pytest.fixture(scope="module")
def wheel():
    return Path(WHEEL).resolve()


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Root of a fresh virtual environment: the wheel, and the dependencies of this one."""
    root = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True)
    site = next((root / "lib").glob("python3*/site-packages"))
    # .pth files are read in this folder alone, so the editable install of the checkout stays out.
    folders = {entry for entry in sys.path if Path(entry).name == "site-packages"}
    folders |= {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("".join(f"{folder}\n" for folder in sorted(folders)))
    pip = [sys.executable, "-m", "pip", "--python", root / "bin/python", "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", wheel], check=True)
    return root


@pytest.fixture
def run(installed, tmp_path):
    """Runs a program of the fresh environment in an empty folder, with no compiler on PATH."""

    def run(program, *arguments):
        hidden = ("PYTHON", "DIST_INT8_", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        answer = subprocess.run(
            [installed / "bin" / program, *map(str, arguments)],
            env={**kept, "PATH": str(installed / "bin"), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    return run


def test_tag_is_manylinux_for_any_python_3(wheel):
    python, abi, platform = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert platform.startswith("manylinux_2_")


def test_wheel_holds_the_library_the_types_and_the_configs(names):
    for name in ("_ops.so", "py.typed", "configs/models/bloom-176b/config.json"):
        assert f"dist_int8/{name}" in names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_wheel_holds_nothing_but_the_package(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dist_int8"}


def test_library_brings_no_libraries_of_torch(names):
    assert [name for name in names if name.endswith(".so")] == ["dist_int8/_ops.so"]


def test_package_is_imported_from_the_wheel(run, installed):
    where = run("python", "-c", "import dist_int8; print(dist_int8.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    assert run("dist-int8", "--version").startswith("dist-int8 ")


def test_no_compiler_is_in_reach(run):
    code = f"import shutil; print([name for name in {COMPILERS} if shutil.which(name)])"
    assert run("python", "-c", code) == "[]\n"


def test_kernels_of_the_wheel_are_loaded(run, installed):
    report = run("dist-int8", "doctor")
    assert str(installed) in report and "dist_int8 can run here" in report


def test_plan_finds_the_shipped_shapes(run):
    flags = ["--model", "configs/models/bloom-176b", "--gpus", "4", "--memory", "80GB"]
    assert "cuda:3" in run("dist-int8", "plan", *flags)


def test_generate_starts_its_other_stage(run, tiny_llama):
    flags = ["--model", tiny_llama, "--device", "cpu", "--prompt", "Hello", "-n", "4", "--quiet"]
    assert run("dist-int8", "generate", *flags, "--stages", "2").strip()
