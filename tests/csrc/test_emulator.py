"""The emulator that runs kernels on the host, and the fragment maps: right, and strict."""

import subprocess

import pytest

BROKEN = {
    "no-barrier": "",
    "no-second-barrier": "",
    "no-warp-sync": "",
    "no-wait": "",
    "no-barrier-after-wait": "",
    "never-waited": "asynchronous copies not waited for",
    "divergent-shuffle": "ends while others",
    "divergent-barrier": "wait for each other",
    "misaligned": "not aligned to 16 bytes",
    "outside": "shared memory",
}


@pytest.fixture(params=[False, True], ids=["plain", "sanitized"])
def emulator(request, compile_program):
    return compile_program("emulator", sanitize=request.param)


def test_maps_collectives_and_tensor_cores(emulator):
    done = subprocess.run([emulator], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_noticed(emulator, name):
    done = subprocess.run([emulator, name], capture_output=True, text=True)
    assert done.returncode == (3 if BROKEN[name] else 4), done.stderr
    assert BROKEN[name] in done.stderr
