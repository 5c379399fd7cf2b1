"""Where a running pipeline listens: on one machine nowhere but on loopback, under every launcher.

Reads the kernel's tables for every process of a pipeline that has just answered.
"""

import ipaddress
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_int8.launcher.supervisor import free_port

LISTENING = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}  # include/net/tcp_states.h
BIN = Path(sys.executable).parent
# Answers one prompt, says so, and stays until its standard input closes.
ANSWER_AND_STAY = """
import sys, dist_int8
with dist_int8.load(sys.argv[1], devices=["cpu"] * 2, threads_per_stage=1, progress=False) as model:
    model.generate(["Hello"], max_new_tokens=4)
    print("answered", flush=True)
    sys.stdin.readline()
"""


def address_of(hexadecimal: str) -> str:
    """ "127.0.0.1" of "0100007F": 32-bit words in the byte order of this machine."""
    words = [hexadecimal[i : i + 8] for i in range(0, len(hexadecimal), 8)]
    packed = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    return str(ipaddress.ip_address(packed))


def listening(pid: int) -> set[str]:
    """ "address:port" of the sockets on which a process listens, UDP sockets without a peer too."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:  # closed in the meantime
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table, state in LISTENING.items():
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add(f"{address_of(address)}:{int(port, 16)}")
    return found


def processes_of(pid: int) -> dict[int, str]:
    """A process and all below it: process id -> command line."""
    found = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= processes_of(int(child))
    return found


def is_loopback(endpoint: str) -> bool:
    return ipaddress.ip_address(endpoint.rpartition(":")[0]).is_loopback


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "answer_and_stay.py"
    file.write_text(ANSWER_AND_STAY)
    return str(file)


def audit(command: list[str]) -> list[tuple[str, set[str]]]:
    """(command line, where it listens) of every process of a pipeline that has answered."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    pipeline = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        deadline = time.monotonic() + 120
        for line in pipeline.stdout:
            assert time.monotonic() < deadline
            if "answered" in line:
                break
        found = [(line, listening(pid)) for pid, line in processes_of(pipeline.pid).items()]
    finally:
        pipeline.communicate("\n", timeout=60)
    assert pipeline.returncode == 0
    return found


LAUNCHERS = {
    "load()": [sys.executable],
    "dist-int8 launch": [str(BIN / "dist-int8"), "launch", "--stages", "2"],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--no_local_rank", "--master_port"],
}


def test_the_socket_audit_finds_listeners_on_other_interfaces():
    with socket.socket() as tcp, socket.socket(socket.AF_INET6) as tcp6:
        tcp.bind(("0.0.0.0", 0))
        tcp.listen()
        tcp6.bind(("::1", 0))
        tcp6.listen()
        found = listening(os.getpid())
        assert f"0.0.0.0:{tcp.getsockname()[1]}" in found
        assert f"::1:{tcp6.getsockname()[1]}" in found
    assert is_loopback("127.0.0.1:5") and is_loopback("::1:5")
    assert not is_loopback("0.0.0.0:5") and not is_loopback(":::5")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_listen_on_loopback_only(tiny_llama, script, launcher):
    command = list(LAUNCHERS[launcher])
    if command[-1].endswith("port"):
        command.append(str(free_port()))
    found = audit([*command, script, str(tiny_llama)])
    ranks = [
        where for line, where in found if "dist_int8.launcher.rank" in line or is_rank(line, script)
    ]
    assert len(ranks) == 2 and all(ranks), found  # gloo listens on every rank
    public = [
        (line, endpoint) for line, where in found for endpoint in where if not is_loopback(endpoint)
    ]
    if launcher == "torchrun":  # its agent's store listens on every interface
        assert [line for line, _ in public if "torchrun" not in line] == [], public
    else:
        assert not public


def is_rank(line: str, script: str) -> bool:
    """Whether a process runs the script itself, not a launcher that was told of it."""
    return script in line.split()[1:3]
