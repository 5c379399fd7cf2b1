"""Runs a compiler and keeps what it said beside the object: `record.py nvcc ... -o X.o` -> X.o.log.

CMake puts this in front of nvcc. The first line of the log is the time the compiler took; the rest
is its output, registers and spills of every kernel among it (-Xptxas=-v). report.py reads the logs.
"""

import subprocess
import sys
import time
from pathlib import Path


def main(command: list[str]) -> int:
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    seconds = time.monotonic() - start
    if done.returncode != 0:
        sys.stdout.buffer.write(done.stdout)
        return done.returncode
    if "-o" in command:
        log = Path(command[command.index("-o") + 1] + ".log")
        log.write_bytes(b"%.1f seconds\n" % seconds + done.stdout)
    for line in done.stdout.splitlines(keepends=True):
        if b"warning" in line.lower():
            sys.stdout.buffer.write(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
