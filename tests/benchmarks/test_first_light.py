"""The runner of first light: budget, limits, resuming, kills."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bundle
import first_light
import pytest
import records
from outcome import assert_whole, ends, statuses
from steps import STEPS, Place, Step

SCRIPTS = Path(first_light.__file__).parent


def step(name, code, limit_s=20, least_s=0):
    return Step(name, lambda _: [sys.executable, "-c", code], 1, limit_s, least_s, "a test")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: steps, flags -> exit status; results are in tmp_path / "out"."""

    def call(steps, *flags):
        monkeypatch.setattr(first_light, "STEPS", tuple(steps))
        return first_light.main(["--out", str(tmp_path / "out"), "--device", "cpu", *flags])

    return call


def test_outcome_of_each_step_is_recorded(run, tmp_path, capsys):
    steps = [
        step("good", "print('fine')"),
        step("bad", "import sys; print('wrong'); sys.exit(1)"),
        step("crashing", "import os; os.abort()"),
        step("hanging", "import time; print('here', flush=True); time.sleep(100)", limit_s=1),
        step("elsewhere", f"import sys; print('no GPU'); sys.exit({first_light.SKIPPED})"),
        step("dear", "print('never')", least_s=1000),
        step("last", "print('fine too')"),
    ]
    assert run(steps, "--budget", "60") == 1
    assert statuses(tmp_path / "out") == {
        "good": "passed",
        "bad": "failed",
        "crashing": "crashed",
        "hanging": "timed out",
        "elsewhere": "skipped",
        "dear": "not run",
        "last": "passed",
    }
    assert ends(tmp_path / "out")["hanging"]["last_line"] == "here"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "3 of 7 steps passed; not: bad, crashing, hanging, dear"
    assert [ends(tmp_path / "out")[name].get("code") for name in ("bad", "crashing")] == [1, -6]
    assert (tmp_path / "out" / "summary.txt").read_text().splitlines()[-1] == said
    assert_whole(tmp_path / "out")


def test_all_passed_is_exit_status_0(run):
    assert run([step("good", "pass"), step("also", "pass")]) == 0


def test_the_budget_cuts_a_step_short_and_leaves_the_others_out(run, tmp_path):
    steps = [step("slow", "import time; time.sleep(100)", limit_s=50), step("next", "pass", 5, 3)]
    started = time.monotonic()
    assert run(steps, "--budget", "6") == 1
    assert time.monotonic() - started < 6 + first_light.MARGIN_S
    assert statuses(tmp_path / "out") == {"slow": "cut short", "next": "not run"}
    assert "s of the budget are left, it needs 3" in ends(tmp_path / "out")["next"]["last_line"]


def test_hanging_step_leaves_time_for_the_others(run, tmp_path):
    hang = "import time; time.sleep(100)"
    steps = [step(name, hang, limit_s=60) for name in ("a", "b", "c", "d")]
    assert run([*steps, step("last", "pass", least_s=1)], "--budget", "14") == 1
    found = statuses(tmp_path / "out")
    assert found["a"] == found["b"] == "cut short"
    assert ends(tmp_path / "out")["a"]["seconds"] < 9  # 2.5 fifths of 10


def test_restarted_step_skips_what_it_tried(run, tmp_path):
    count = tmp_path / "count"
    code = (
        f"import pathlib, sys; p = pathlib.Path({str(count)!r}); p.open('a').write(sys.argv[1]); "
        f"sys.exit(0 if len(p.read_text()) > 2 else {first_light.RESTART})"
    )
    again = Step(
        "again",
        lambda place: [sys.executable, "-c", code, "s" if place.skip_tried else "f"],
        *(1, 30, 0),
        "a test",
    )
    assert run([again]) == 0 and count.read_text() == "fss"


def test_torn_junit_file_does_not_stop_the_run(run, tmp_path):
    code = "import sys; open(sys.argv[1], 'w').write('<testsuites><testsu')"
    torn = Step("torn", lambda _: [sys.executable, "-c", code, "{junit}"], 1, 20, 0, "a test")
    assert run([torn, step("next", "pass")]) == 0
    assert not (tmp_path / "out" / "tests.xml").exists()


def test_runner_survives_a_closed_stdout(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", DRIVER, "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0 and len(ends(out)) == 6


def test_clocks_are_recorded_while_a_step_runs(run, tmp_path, monkeypatch):
    """From a program in the place of nvidia-smi: idle, then busy."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    lines = (
        "345, 2619, 70.1, 30, 0\\n1980, 2619, 400.5, 45, 90\\n1755, 2619, 690.0, 61, 100\\n[N/A]\\n"
    )
    said = f"case \"$*\" in *loop*) printf '{lines}'; sleep 60;; *) echo 'NVIDIA H100, 580';; esac"
    program.write_text(f"#!/bin/sh\n{said}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert run([step("first", "import time; time.sleep(0.5)")]) == 0
    assert ends(tmp_path / "out")["first"]["clocks"] == {
        "sm_mhz": [1755, 1867.5, 1980],
        "mem_mhz": [2619, 2619, 2619],
        "power_w": [400.5, 545.25, 690],
        "temperature_c": [45, 53, 61],
        "busy_pct": [90, 95, 100],
    }
    calls = [r for r in records.read(tmp_path / "out" / "results.jsonl") if r["kind"] == "run"]
    assert calls[0]["card"] == "NVIDIA H100, 580"


ONCE = "import pathlib; pathlib.Path('{}').open('a').write('x')"


def test_resuming_continues_where_it_stopped(run, tmp_path):
    count = tmp_path / "count"
    first = step("first", ONCE.format(count))
    assert (
        run([first, step("second", "import sys; sys.exit(1)"), step("third", "pass", 20, 999)]) == 1
    )
    steps = [first, step("second", "pass"), step("third", "pass")]
    with pytest.raises(SystemExit):
        run(steps)  # the folder has results: they are not overwritten
    assert run(steps, "--resume") == 1
    assert count.read_text() == "x"
    assert statuses(tmp_path / "out") == {"first": "passed", "second": "failed", "third": "passed"}
    assert run(steps, "--resume", "--only", "second") == 0  # repaired, and run again
    assert statuses(tmp_path / "out")["second"] == "passed" and count.read_text() == "x"
    never = [step("second", "pass", 20, 999)]
    assert run(never, "--resume", "--only", "second") == 0  # there was no time: it stays as it was


def test_resuming_in_another_folder_brings_the_results_along(run, tmp_path, monkeypatch):
    assert run([step("first", "pass"), step("second", "pass", 20, 9999)]) == 1
    steps = (step("first", "raise SystemExit(1)"), step("second", "pass"))
    monkeypatch.setattr(first_light, "STEPS", steps)
    flags = ["--resume", str(tmp_path / "out"), "--device", "cpu"]
    assert first_light.main(["--out", str(tmp_path / "new"), *flags]) == 0
    assert statuses(tmp_path / "new") == {"first": "passed", "second": "passed"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--out must be given"),
        (["--out", "x", "--budget", "0"], "--budget must be seconds above 0"),
        (["--out", "x", "--budget", "nan"], "--budget must be seconds above 0"),
        (["--out", "x", "--break", "card=melt"], "--break must be STEP=hang|crash|overrun"),
        (["--out", "x", "--break", "cart=hang"], "got cart=hang"),
        (["--out", "x", "--break", "card=hang"], "--break must come with --device cpu"),
        (["--out", "x", "--bundle", "nowhere"], "--bundle must hold a manifest.json"),
        (["--out", "/proc/x"], "--out must be a folder that can be made"),
        (["--out", "/etc/hostname"], "--out must be a folder, got the file"),
        (["--out", "x", "--resume", "nowhere"], "--resume must be a folder with results.jsonl"),
        (["--out", "x", "--only", "cart"], "invalid choice: 'cart'"),
    ],
)
def test_bad_flags_are_refused_before_anything_runs(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        first_light.main(flags)
    assert caught.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_list_of_steps_fits_the_budget(capsys):
    assert first_light.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:-1]] == [s.name for s in STEPS]
    assert int(lines[-1].split()[1]) == sum(s.expected_s for s in STEPS) <= 540
    assert all(s.why and s.least_s <= s.expected_s <= s.limit_s for s in STEPS)


def test_every_step_is_a_file_and_every_file_of_tests_a_step():
    place = Place(Path("out"), "cuda", small=False)
    scripts = [next(a for a in s.command(place) if a.endswith(".py")) for s in STEPS]
    assert all(Path(script).is_file() for script in scripts)
    tests = {path.stem for path in (first_light.ROOT / "tests" / "gpu").glob("test_*.py")}
    assert tests == {s.name for s in STEPS if s.name.startswith("test_")}


def test_environment_of_a_step_points_into_the_bundle(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text(json.dumps({"commit": "abc"}))
    monkeypatch.setenv("PYTHONPATH", "/mine")
    found = first_light.environment_of(tmp_path, "cuda")
    assert found["DIST_INT8_LIBRARY"] == str(tmp_path / "_ops.so")
    assert found["DIST_INT8_GPU_TESTS"] == "cuda"
    paths = found["PYTHONPATH"].split(":")
    assert paths[0] == str(first_light.ROOT) and paths[-2:] == [str(tmp_path / "site"), "/mine"]


@pytest.fixture
def packed(tmp_path):
    """A bundle without a library that works, as bundle.py would describe it."""
    (tmp_path / "site" / "pydantic").mkdir(parents=True)
    (tmp_path / "site" / "pydantic" / "__init__.py").write_text("x = 1")
    (tmp_path / "_ops.so").write_bytes(b"library")
    manifest = {
        "commit": "abc",
        "clean": True,
        "tree": records.tree_digest(),
        "sources": records.sources_digest(),
        "python": ".".join(map(str, sys.version_info[:2])),
        "bytes": bundle.sizes(tmp_path),
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def change_manifest(packed, **fields):
    manifest = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps({**manifest, **fields}))


def test_intact_bundle_is_accepted(packed):
    (packed / "site" / "pydantic" / "__pycache__").mkdir()
    (packed / "site" / "pydantic" / "__pycache__" / "x.cpython-312.pyc").write_bytes(b"cache")
    assert bundle.problem(packed) is None


def test_copy_of_a_tree_is_identified_by_its_bundle(packed):
    assert bundle.version(packed) == ("abc", True)
    change_manifest(packed, tree="0" * 64)  # something changed since
    assert bundle.version(packed) == bundle.version(None)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: change_manifest(p, sources="0" * 64), "compiled from this tree's csrc"),
        (lambda p: change_manifest(p, python="2.7"), "must be for Python"),
        (lambda p: (p / "_ops.so").write_bytes(b"lib"), "as it was packed, _ops.so"),
        (lambda p: shutil.rmtree(p / "site"), "as it was packed, site/pydantic"),
        (lambda p: (p / "manifest.json").write_text("{"), "must hold a manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{}"), "must hold a manifest.json"),
    ],
)
def test_damaged_bundle_is_refused(packed, damage, said):
    damage(packed)
    assert said in bundle.problem(packed)


def test_resuming_overwrites_no_results(run, tmp_path, capsys):
    """Results in --out stay, also where those of another folder are to be gone on with."""
    assert run([step("first", "pass")]) == 0
    other = ["--out", str(tmp_path / "other"), "--device", "cpu"]
    assert first_light.main(other) == 0
    before = (tmp_path / "other" / "results.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        first_light.main([*other, "--resume", str(tmp_path / "out")])
    assert "--out must be a new folder" in capsys.readouterr().err
    assert (tmp_path / "other" / "results.jsonl").read_bytes() == before


def test_damaged_results_are_named(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text("nothing\n")
    with pytest.raises(SystemExit):
        first_light.main(["--out", str(tmp_path), "--resume"])
    assert "results.jsonl:1: a line must be a record" in capsys.readouterr().err


def test_rehearsal_cannot_be_resumed_on_a_gpu(run, tmp_path, capsys):
    assert run([step("first", "pass")]) == 0
    with pytest.raises(SystemExit):
        first_light.main(["--out", str(tmp_path / "out"), "--resume", "--device", "cuda"])
    assert "the same device and sizes" in capsys.readouterr().err


def test_terminated_run_reports_its_progress(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", DRIVER, "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("step0")
    begun, deadline = {"step0"}, time.monotonic() + 30
    while "step1" not in begun and time.monotonic() < deadline:  # a record follows the line
        time.sleep(0.01)
        found = records.read(out / "results.jsonl")
        begun = {record["name"] for record in found if record["kind"] == "begin"}
    process.terminate()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + 15
    last = "1 of 6 steps passed; not: step1; not reached: step2, step3, step4, step5"
    assert said.splitlines()[-1] == last
    assert (out / "summary.txt").exists()


# Steps that write a record every few milliseconds, and one whose JUnit file is added each time.
DRIVER = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import first_light
from steps import Step

WRITE = (
    "import sys, time; sys.path.insert(0, {str(SCRIPTS)!r}); import records; "
    "r = records.Records(__import__('pathlib').Path(sys.argv[1]), 'writer'); "
    "[(r.add('cell', text='x' * 5000, i=i), time.sleep(0.002)) for i in range(150)]; "
    "open(sys.argv[2], 'w').write('<testsuites><testsuite><testcase classname=\\"a\\"/>' + "
    "'<p>' + 'y' * 100000 + '</p></testsuite></testsuites>')"
)
def command(place):
    return [sys.executable, "-c", WRITE, str(place.records), "{{junit}}"]
first_light.STEPS = tuple(Step(f"step{{i}}", command, 1, 20, 0, "a test") for i in range(6))
sys.exit(first_light.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("seed", range(6))
def test_kill_at_any_moment_leaves_complete_files(tmp_path, seed):
    out = tmp_path / "out"
    command = [sys.executable, "-c", DRIVER, "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(random.Random(seed).uniform(0.3, 3.0))
    process.kill()
    process.wait()
    time.sleep(0.2)  # what it started is being ended
    if not out.exists():
        return
    found = assert_whole(out)
    over = list(ends(out))
    assert over == [f"step{i}" for i in range(len(over))]
    running = [r["name"] for r in found if r["kind"] == "begin"][len(over) :]
    assert len(running) <= 1
    done = subprocess.run([*command, "--resume"], stdout=subprocess.DEVNULL)
    assert done.returncode == 0 and len(ends(out)) == 6
    assert_whole(out)
