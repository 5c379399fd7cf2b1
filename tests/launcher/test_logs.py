import os
import subprocess
import sys

import pytest

SAY = """
import logging
from dist_int8.launcher import logs
logs.configure({verbosity})
logger = logging.getLogger("dist_int8.anywhere")
for level in ("debug", "info", "warning", "error"):
    getattr(logger, level)("one " + level)
"""


def say(verbosity, **environment):
    done = subprocess.run(
        [sys.executable, "-c", SAY.format(verbosity=verbosity)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""
    return done


@pytest.mark.parametrize(
    ("verbosity", "environment", "num_lines"),
    [
        (None, {}, 2),
        (-1, {}, 1),
        (0, {}, 2),
        (1, {}, 3),
        (2, {}, 4),
        (None, {"DIST_INT8_LOG": "info"}, 3),
        (None, {"DIST_INT8_LOG": "ERROR"}, 1),
        (None, {"DIST_INT8_LOG": ""}, 2),
        (0, {"DIST_INT8_LOG": "debug"}, 2),  # a flag wins over the environment
    ],
)
def test_the_level_decides_what_reaches_stderr(verbosity, environment, num_lines):
    lines = say(verbosity, **environment).stderr.splitlines()
    assert len(lines) == num_lines and lines[-1].endswith("one error")


def test_a_level_that_does_not_exist_is_refused_by_name():
    message = say(None, DIST_INT8_LOG="loud").stderr.splitlines()[-1]
    assert message.endswith(
        "environment: DIST_INT8_LOG must be one of error, warning, info, debug, got 'loud'; "
        "unset it for warnings"
    )
