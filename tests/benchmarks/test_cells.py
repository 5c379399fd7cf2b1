"""Cells of a step: each is tried once, and costs itself alone."""

import os
import subprocess
import sys
from pathlib import Path

import cells
import pytest
import records

SCRIPTS = Path(cells.__file__).parent
STEP = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(SCRIPTS)!r})
import cells, records

def measure(number):
    if number == 1:
        raise ValueError("one is\\nwrong")
    if number == 2:
        time.sleep(1000)
    if number == 4:  # what a broken CUDA context does to every later call
        cells.is_lost = lambda: True
        raise RuntimeError("CUDA error")
    return {{"square": number ** 2}}

skip = "begin" if "--skip-tried" in sys.argv else None
found = cells.Cells(records.Records(Path(sys.argv[1]), "step"), skip)
for number in range(6):
    found.run("cell", {{"number": number}}, lambda: measure(number), limit_s=1.0)
sys.exit(found.status())
"""


def run(path, *flags):
    command = [sys.executable, "-c", STEP, str(path), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_failing_or_hanging_cell_does_not_affect_others(tmp_path):
    path = tmp_path / "results.jsonl"
    records.Records(path, "first_light").add("begin", name="step")
    hung = run(path)
    assert hung.returncode == cells.RESTART and "in measure" in hung.stdout
    assert run(path, "--skip-tried").returncode == cells.RESTART
    assert run(path, "--skip-tried").returncode == 1
    step = records.Records(path, "step")
    assert [(r["number"], r["square"]) for r in step.mine("cell")] == [(0, 0), (3, 9), (5, 25)]
    errors = {r["cell"]["number"]: r["error"] for r in step.mine("error")}
    assert errors == {
        1: "ValueError: one is wrong",
        2: "no result after 1 s",
        4: "RuntimeError: CUDA error",
    }


def test_tried_cells(tmp_path):
    path = tmp_path / "results.jsonl"
    step, runner = records.Records(path, "step"), records.Records(path, "first_light")

    def is_measured(skip_tried):
        return cells.Cells(step, skip_tried).run("cell", {"a": 1}, lambda: {}) is not None

    assert is_measured(None) and is_measured(None)
    assert not is_measured("ever") and not is_measured("begin")
    runner.add(
        "begin", name="step"
    )  # a new run after a fix: the tries of an earlier one do not count
    assert not is_measured("ever") and is_measured("begin")
    assert not is_measured("begin")


def test_errors_before_the_step_was_begun_again_do_not_count(tmp_path):
    path = tmp_path / "results.jsonl"
    step = records.Records(path, "step")
    step.add("error", cell={"a": 1}, error="old")
    assert cells.Cells(step, None).status() == 1
    records.Records(path, "first_light").add("begin", name="step")
    assert cells.Cells(step, None).status() == 0


TESTS = """
import time
import pytest

@pytest.mark.parametrize("number", range(6))
def test_it(number):
    if number == 2:
        time.sleep(1000)
    assert number != 4
"""


def test_hanging_test_does_not_affect_others(tmp_path):
    file, path = tmp_path / "test_hang.py", tmp_path / "results.jsonl"
    file.write_text(TESTS)
    command = [sys.executable, "-m", "pytest", str(file), "-p", "pytest_records", "-q"]
    command += ["--records", str(path), "--test-limit", "2", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    codes = [
        subprocess.run([*command, *flags], env=environment, cwd=tmp_path, capture_output=True)
        for flags in ([], ["--skip-tried", "begin"])
    ]
    assert [done.returncode for done in codes] == [cells.RESTART, 1]
    step = records.Records(path, "test_hang")
    counts = [(r["passed"], r["failed"]) for r in step.mine("tests")]
    assert counts == [(2, 1), (2, 1)]
    lost = step.mine("lost")[0]
    assert lost["test"].endswith("test_it[2]") and "time.sleep(1000)" in lost["message"]
    assert step.mine("failure")[0]["error"] == "assert 4 != 4"


@pytest.mark.parametrize("error", [ValueError("a\nb"), KeyError("x"), AssertionError()])
def test_errors_are_one_line(error):
    said = cells.one_line(error)
    assert "\n" not in said and said.startswith(type(error).__name__)
