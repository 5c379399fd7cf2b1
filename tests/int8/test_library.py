"""Which compiled library is loaded: the built one, or the one that the environment names."""

import os
import shutil
import subprocess
import sys

import pytest

from dist_int8.int8 import ops

SAY = "from dist_int8.int8 import ops; print(ops.library_info()['path'])"


def import_ops(library, **environment):
    """ops, imported in a process of its own with DIST_INT8_LIBRARY set."""
    return subprocess.run(
        [sys.executable, "-c", SAY],
        capture_output=True,
        text=True,
        env={**os.environ, "DIST_INT8_LIBRARY": str(library), **environment},
    )


def test_a_named_library_is_the_one_that_is_loaded(tmp_path):
    built = ops.library_info()["path"]
    if built is None:
        pytest.skip("no library is built")
    named = tmp_path / "other.so"
    shutil.copy(built, named)
    assert import_ops(named).stdout.strip() == str(named)


def test_an_unknown_instruction_set_is_refused():
    answer = import_ops("", DIST_INT8_CPU_ISA="AVX2")
    assert answer.returncode == 1
    assert "DIST_INT8_CPU_ISA must be one of amx, avx512_vnni, avx2, generic, got 'AVX2'" in (
        answer.stderr
    )


@pytest.mark.parametrize(("content", "said"), [(None, "is not there"), (b"no", "did not load")])
def test_a_named_library_that_cannot_be_used_is_refused(tmp_path, content, said):
    named = tmp_path / "other.so"
    if content is not None:
        named.write_bytes(content)
    answer = import_ops(named)
    assert answer.returncode == 1
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("ImportError: environment: DIST_INT8_LIBRARY") and said in last
