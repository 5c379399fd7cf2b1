"""The threads of CPU kernels: tasks run once, nobody waits for who has not begun, clean ends."""

import subprocess

import pytest

CHECKS = ("covers", "helpers_work", "nested", "error", "blocked", "ends", "idle", "fork", "limit")
# A signal or a fork in the middle of threads is what the sanitizer itself does not bear.
SANITIZED_CHECKS = ("covers", "helpers_work", "nested", "error", "ends", "idle")


def run(program, check):
    done = subprocess.run([program, check], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("check", CHECKS)
def test_threads(compile_program, check):
    run(compile_program("threads"), check)


@pytest.mark.parametrize("check", SANITIZED_CHECKS)
def test_threads_race_for_nothing(compile_program, check):
    run(compile_program("threads", sanitize="thread"), check)
