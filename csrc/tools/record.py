"""Runs a compiler and keeps what it said beside the object: `record.py nvcc ... -o X.o` -> X.o.log.

CMake puts this in front of nvcc. The first line of the log is the processor time of the compiler
(how long it waits for other jobs says nothing); the rest is its output, registers and spills of
every kernel among it (-Xptxas=-v). report.py reads the logs.
"""

import resource
import subprocess
import sys
from pathlib import Path


def main(command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
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
