"""Ranks run the package of rank 0, wherever it lies, and no file of the working directory."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dist_int8

PACKAGE = Path(dist_int8.__file__).parent
BIN = Path(sys.executable).parent
PROMPT = ["--device", "cpu", "-p", "To be", "-n", "2", "--quiet"]
# Libraries that a rank imports, and ones that it, or a library, would import if they were there.
NAMES = ["apex", "launcher", "pydantic", "safetensors", "sklearn", "torch", "transformers", "yaml"]
TRAP = "import os; open({marker!r}, 'a').write(__file__ + chr(10))\nraise ImportError('a trap')\n"
ASK = "[answer.token_ids for answer in model.generate([[1, 2]], max_new_tokens=2)]"
SESSION = f"""
import sys
# an editable install would be found first, whatever is on the path
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
sys.path.insert(0, sys.argv[1])
import dist_int8
sys.path.remove(sys.argv[1])  # what lies beside the package is not for rank 0 either
with dist_int8.load(sys.argv[2], devices=["cpu"] * 2, progress=False, max_tokens=64) as model:
    print(dist_int8.__file__, {ASK})
"""
COMMANDS = {
    "two ranks": [BIN / "dist-int8", "generate", "--stages", "2"],
    "python -m": [sys.executable, "-m", "dist_int8", "generate", "--stages", "1"],
    "dist-int8 launch": [BIN / "dist-int8", "launch", "--stages", "2", "generate"],
    "torchrun -m": [BIN / "torchrun", "--nproc-per-node", "2", "-m", "dist_int8", "generate"],
}


def run(command, folder, **environment):
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def trapped(tmp_path):
    """A working directory whose Python files leave their names in `marker` when they run."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(TRAP.format(marker=str(tmp_path / "marker")))
    return folder


@pytest.mark.parametrize("how", COMMANDS)
def test_no_rank_runs_a_file_of_the_working_directory(tiny_llama, trapped, how):
    answer = run([*COMMANDS[how], "-m", tiny_llama, *PROMPT], trapped)
    marker = trapped.parent / "marker"
    assert not marker.exists(), marker.read_text()
    assert answer.returncode == 0, answer.stderr


def test_the_harness_runs_no_file_of_the_working_directory(trapped):
    answer = run([sys.executable, "-m", "dist_int8.evaluation", "--help"], trapped)
    marker = trapped.parent / "marker"
    assert not marker.exists(), marker.read_text()
    assert answer.returncode == 0 and "lm-eval" in answer.stdout, answer.stderr


def copy_package(target: Path, marker: Path) -> None:
    """A copy of the package that leaves its place in `marker` in every process that imports it."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, target / "dist_int8", ignore=ignored)
    for library in PACKAGE.glob("*.so"):
        (target / "dist_int8" / library.name).symlink_to(library)
    with (target / "dist_int8" / "__init__.py").open("a") as file:
        file.write(f"\nopen({str(marker)!r}, 'a').write(f'{{__file__}}\\n')\n")
    with (target / "dist_int8" / "errors.py").open("a") as file:
        inside = str(marker.with_name("inside"))
        file.write(f"\nopen({inside!r}, 'a').write(f'{{__file__}}\\n')\n")


@pytest.mark.parametrize("kind", ["checkout", "beside other files", "zip"])
def test_ranks_run_the_package_of_rank_0(tiny_llama, tmp_path, kind):
    """The package is known by the parent's sys.path alone; another one is installed."""
    place, marker = tmp_path / "place", tmp_path / "imported"
    copy_package(place, marker)
    if kind == "beside other files":  # the package is taken from there, and nothing else
        for name in NAMES:
            trap = TRAP.format(marker=str(tmp_path / "marker"))
            (place / f"{name}.py").write_text(trap)
    if kind == "zip":
        archive = tmp_path / "package.zip"
        with zipfile.ZipFile(archive, "w") as made:
            for path in place.rglob("*.py"):
                made.write(path, path.relative_to(place))
        place = archive
    answer = run([sys.executable, "-P", "-c", SESSION, place, tiny_llama], tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert str(place) in answer.stdout
    assert marker.read_text().split() == [f"{place}/dist_int8/__init__.py"] * 2
    assert (tmp_path / "inside").read_text().split() == [f"{place}/dist_int8/errors.py"] * 2
    assert not (tmp_path / "marker").exists()
