"""The hosts themselves: however their maker ends, nothing of them is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from needs import missing

MAKE_AND_WAIT = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from hosts import Network
network = Network(2, pathlib.Path(sys.argv[2]))
network.hosts[0].start(["sleep", "600"])
print(*[host.pid for host in network.hosts], flush=True)
sys.stdin.read()
"""


def namespaces() -> set[str]:
    """Of the network, of every process."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.add(os.readlink(folder / "ns" / "net"))
        except OSError:  # it has ended
            continue
    return found


def test_hosts_die_with_who_made_them(tmp_path):
    why = missing()
    if why:
        pytest.fail(f"multi-node test not run: {why}", pytrace=False)
    command = [sys.executable, "-c", MAKE_AND_WAIT, str(Path(__file__).parent), str(tmp_path)]
    maker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in maker.stdout.readline().split()]
    made = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
    assert len(made) == 2 and made <= namespaces()
    maker.send_signal(signal.SIGKILL)
    maker.communicate()
    deadline = time.monotonic() + 20
    while made & namespaces():
        assert time.monotonic() < deadline, "processes are left in a host"
        time.sleep(0.05)
