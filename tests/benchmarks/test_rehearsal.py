"""The real steps of first light on the CPU, some made to hang, to crash or to take too long."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import first_light
import pytest
import report
from outcome import assert_whole, statuses
from steps import STEPS

SCRIPTS = Path(first_light.__file__).parent
REHEARSED = [s.name for s in STEPS if not s.name.startswith("test_")]
REHEARSED += ["test_matmul", "test_rows", "test_models", "test_sanitizer"]  # one stands for many


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Real steps on the CPU, one made to hang, one to crash."""
    out = tmp_path_factory.mktemp("rehearsal") / "out"
    command = [sys.executable, str(SCRIPTS / "first_light.py"), "--out", str(out)]
    command += ["--device", "cpu", "--small", "--budget", "240"]
    flags = [flag for name in REHEARSED for flag in ("--only", name)]
    flags += ["--break", "test_rows=hang", "--break", "block=crash"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=out.parent)
    return out, done, command


def test_rehearsal_reports_failures_and_runs_the_rest(rehearsal):
    out, done, _ = rehearsal
    assert done.returncode == 1
    found = statuses(out)
    assert sorted(found) == sorted(REHEARSED)
    wrong = {name: status for name, status in found.items() if status not in report.GOOD}
    assert wrong == {"test_rows": "timed out", "block": "crashed"}, done.stdout
    assert done.stdout.splitlines()[-1].endswith("steps passed; not: test_rows, block")


def test_a_rehearsal_has_records_of_every_kind(rehearsal):
    out, _, _ = rehearsal
    found = assert_whole(out)
    kinds = {(record["step"], record["kind"]) for record in found}
    assert {
        ("card", "environment"),
        ("card", "op"),
        ("test_matmul", "tests"),
        ("model", "decode"),
        ("model", "prefill"),
        ("stages", "layout"),
        ("linear", "cell"),
        ("device_profile", "profile"),
    } <= kinds
    suites = ElementTree.parse(out / "tests.xml").getroot()
    names = {suite.get("name") for suite in suites}
    assert "tests.gpu.test_matmul" in names and "tests.gpu.test_rows" not in names
    engines = {r["engine"] for r in found if (r["step"], r["kind"]) == ("model", "decode")}
    ours = {"ours", "ours, kernel by kernel", "ours, int8 KV", "ours, sampling"}
    assert engines == {*ours, "transformers"}
    assert [r["equal"] for r in found if (r["step"], r["kind"]) == ("model", "tokens")] == [True]


def test_rehearsal_contributes_no_figures(rehearsal):
    out, _, _ = rehearsal
    figures = report.Figures([out / "results.jsonl"])
    assert not figures.runs and report.NONE in report.linear(figures)


def test_rehearsal_can_be_resumed_until_its_budget_ends(rehearsal):
    """The step that crashed is run again by name; the next takes all that is left."""
    out, _, command = rehearsal
    names = ["block", "device_profile", "counters"]
    flags = ["--resume", *(flag for name in names for flag in ("--only", name))]
    budget = ["--budget", "26", "--break", "device_profile=overrun"]
    done = subprocess.run([*command, *flags, *budget], capture_output=True, text=True)
    assert done.returncode == 1
    found = statuses(out)
    assert [found[name] for name in names] == ["passed", "cut short", "not run"], done.stdout
