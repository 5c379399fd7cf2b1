"""launch/generate.py under every launcher: the text of the plain command, and clean ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPT = "launch/generate.py"
LAUNCHERS = {
    "deepspeed": [BIN / "deepspeed", "--num_gpus", "2", "--master_port", "29541", SCRIPT],
    "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", "29542", SCRIPT],
    "accelerate": [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", SCRIPT],
    "launch generate": [BIN / "dist-int8", "launch", "--stages", "2", "generate"],
    "launch script": [BIN / "dist-int8", "launch", "--stages", "2", SCRIPT],
    "python": [sys.executable, SCRIPT, "--stages", "2"],
}
SHELL_SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def flags(model, *more):
    return ["--model", model, "--device", "cpu", "--prompt", "The capital of France is", *more]


def environment(**more):
    path = f"{BIN}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def expected(tiny_llama):
    """The text of the plain command, on one stage."""
    command = [BIN / "dist-int8", "generate", *flags(tiny_llama, "-n", "12", "--quiet")]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment(), cwd=ROOT
    )
    return answer.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_same_text_under_every_launcher(tiny_llama, expected, launcher):
    command = [*LAUNCHERS[launcher], *flags(tiny_llama, "-n", "12", "--quiet")]
    answer = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        cwd=ROOT,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    if launcher == "deepspeed":  # its own log is on stdout too
        assert answer.stdout.count(expected.strip("\n")) == 1
    else:
        assert answer.stdout == expected


def test_an_error_is_printed_once_for_all_ranks(tmp_path):
    command = [*LAUNCHERS["launch generate"], *flags(tmp_path / "none")]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(), cwd=ROOT
    )
    assert answer.returncode == 2 and answer.stdout == ""
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no such folder" in errors[0]


def ranks_of(pid: int) -> dict[int, int]:
    """Rank -> process id of the running children of a launcher."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        values = dict(v.split(b"=", 1) for v in variables if b"=" in v)
        if state != "Z" and int(parent) == pid and b"RANK" in values:
            found[int(values[b"RANK"])] = int(folder.name)
    return found


def test_a_rank_that_dies_during_generate_ends_everything(tiny_llama):
    """Rank 1 is killed while tokens stream: an exit code, a line that names it, nothing left."""
    endless = flags(tiny_llama, "-n", "200000", "--max-tokens", "256")
    command = [*LAUNCHERS["launch generate"], *endless, *["--prompt", "again"] * 400]
    launcher = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd=ROOT
    )
    deadline = time.monotonic() + 60
    while b"blocks" not in launcher.stderr.readline():  # the plan: both ranks are on their way
        assert time.monotonic() < deadline
    time.sleep(5.0)
    ranks = ranks_of(launcher.pid)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    _, stderr = launcher.communicate(timeout=30)
    assert launcher.returncode not in (0, None)
    assert time.monotonic() - killed < 10
    assert b"rank 1" in stderr and b"Traceback" not in stderr
    assert not ranks_of(launcher.pid)


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_dry_run_prints_the_command_and_runs_nothing(script):
    knobs = {"DRY_RUN": "1", "MODEL": "my model", "PROMPT": "it's", "CONFIG": "configs/x.yaml"}
    answer = subprocess.run(
        ["bash", script, "--chat"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(**knobs),
        cwd=ROOT,
    )
    assert answer.stdout == ""
    for part in ["launch/generate.py", r"my\ model", r"it\'s", "configs/x.yaml", "--chat"]:
        assert part in answer.stderr


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_header_of_a_script_says_how_to_use_it(script):
    header = script.read_text().split("set -euo pipefail")[0]
    assert f"bash launch/{script.name}" in header and "DRY_RUN=1" in header


def test_slurm_script_under_an_srun_of_two_tasks(tiny_llama, expected, tmp_path):
    """launch/slurm.sh with an srun that starts its tasks here and tells them what Slurm's would."""
    srun = tmp_path / "srun"
    srun.write_text(
        "#!/usr/bin/env bash\n"
        "shift  # --kill-on-bad-exit=1\n"
        "export SLURM_JOB_ID=7 SLURM_STEP_NODELIST=node-[3-4] SLURM_STEP_TASKS_PER_NODE=2\n"
        'for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & done; wait\n'
    )
    srun.chmod(0o755)
    knobs = {"MODEL": str(tiny_llama), "DEVICE": "cpu", "MAX_NEW_TOKENS": "12"}
    answer = subprocess.run(
        ["bash", ROOT / "launch/slurm.sh", "--quiet"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=sys.executable, **knobs),
        cwd=ROOT,
        timeout=120,
    )
    assert answer.stdout == expected
