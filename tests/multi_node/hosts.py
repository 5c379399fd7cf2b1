"""Machines made of namespaces: an address, a name, processes and an sshd each, one switch between.

Nothing outside of the namespaces is touched. Each hangs on a pipe from this process: when that
closes, however this process ends, its first process ends, and the kernel kills and removes the
rest.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from needs import NAMESPACES, SEARCH, program

WIRE = Path(__file__).with_name("wire.py")
SSH_PORT = 2222
PATIENCE_S = 20.0
SWITCH_PROCESSES = ["unshare", "--net", "--fork"]
FIRST_PROCESS = ["bash", "-c", "read _"]

SSHD_CONFIG = """\
ListenAddress {address}
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
"""
SSH_CONFIG = """\
Host *
  Port {port}
  IdentityFile {folder}/key
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  LogLevel ERROR
"""
# Names, keys and an account that is not locked, seen by this host's processes alone.
SET_UP = """\
set -e
hostname {name}
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/shadow /etc/shadow
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
ip link set lo up
ip link set eth0 up
ip address add {address}/24 dev eth0
exec {sshd} -f {folder}/{name}.sshd_config
"""


class Namespace:
    """Namespaces with a first process that ends when this process closes its pipe, or ends."""

    def __init__(self, unshare: list[str]) -> None:
        self._holder = subprocess.Popen([*unshare, *FIRST_PROCESS], stdin=subprocess.PIPE)
        self.pid = self._pid_of_first()

    def _pid_of_first(self) -> int:
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for pid in children.read_text().split():
                if Path(f"/proc/{pid}/comm").read_text() == "bash\n":
                    return int(pid)
            time.sleep(0.01)
        raise TimeoutError("unshare started nothing")

    def inside(self, command: list[str]) -> list[str]:
        """The command that runs `command` in there, in the folder where we are."""
        kinds = ["--net", "--uts", "--mount", "--pid"] if isinstance(self, Host) else ["--net"]
        return ["nsenter", f"--target={self.pid}", *kinds, f"--wd={os.getcwd()}", "--", *command]

    def run(self, *command: str) -> str:
        """Output of a command that must succeed."""
        done = subprocess.run(
            self.inside(list(command)),
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
        )
        assert done.returncode == 0, (command, done.stdout + done.stderr)
        return done.stdout

    def close(self) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(PATIENCE_S)


class Host(Namespace):
    """One machine.

    Attributes:
        name, address: of it, and known to the others.
    """

    def __init__(self, index: int) -> None:
        super().__init__(NAMESPACES)
        self.name = f"host-{index}"
        self.address = f"10.77.0.{1 + index}"

    def start(self, command: list[str], **variables: str) -> subprocess.Popen[str]:
        """A command on this host, as somebody who is logged in would start it."""
        return subprocess.Popen(
            self.inside(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**variables),
        )

    def processes(self) -> dict[int, str]:
        """Process id -> command line of what runs here, except for the first process and sshd."""
        here = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns" / "pid") != here or int(folder.name) == self.pid:
                    continue
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # it has ended
                continue
            if state != "Z" and "sshd" not in line:
                found[int(folder.name)] = line
        return found

    def kill_all(self) -> None:
        """Ends what a test may have left here; so that the next one need not wait for it."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Network:
    """Some hosts on one switch."""

    def __init__(self, num_hosts: int, folder: Path) -> None:
        self._made: list[Namespace] = []
        try:
            self._switch = self._make(Namespace(SWITCH_PROCESSES))
            self.hosts = [self._make(Host(index)) for index in range(num_hosts)]
            self._switch.run("ip", "link", "add", "bridge", "type", "bridge")
            self._switch.run("ip", "link", "set", "bridge", "up")
            self._write_files(folder)
            for index, host in enumerate(self.hosts):
                cable = ["link", "add", f"s{index}", "type", "veth", "peer", "name", "eth0"]
                self._switch.run("ip", *cable, "netns", str(host.pid))
                self._plug_in(index)
                host.run("sh", "-c", self._set_up(host, folder))
        except BaseException:
            self.close()
            raise

    def _make(self, made):
        self._made.append(made)
        return made

    def _plug_in(self, index: int) -> None:
        self._switch.run("ip", "link", "set", f"s{index}", "master", "bridge", "up")

    def _write_files(self, folder: Path) -> None:
        for key in ("key", "host_key"):
            command = [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", folder / key]
            subprocess.run(command, check=True)
        public = " ".join((folder / "host_key.pub").read_text().split()[:2])
        (folder / "known_hosts").write_text(
            "".join(f"[{host.name}]:{SSH_PORT} {public}\n" for host in self.hosts)
        )
        names = "".join(f"{host.address} {host.name}\n" for host in self.hosts)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (folder / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        (folder / "ssh_config").write_text(SSH_CONFIG.format(port=SSH_PORT, folder=folder))
        for host in self.hosts:
            text = SSHD_CONFIG.format(address=host.address, port=SSH_PORT, folder=folder)
            (folder / f"{host.name}.sshd_config").write_text(text)

    def _set_up(self, host: Host, folder: Path) -> str:
        return SET_UP.format(
            name=host.name,
            address=host.address,
            folder=shlex.quote(str(folder)),
            sshd=program("sshd"),
        )

    def cut(self, host: Host) -> None:
        """Pulls a host's cable; nothing tells the processes on either side."""
        self._switch.run("ip", "link", "set", f"s{self.hosts.index(host)}", "down")

    def restore(self, host: Host) -> None:
        self._switch.run("ip", "link", "set", f"s{self.hosts.index(host)}", "up")

    @contextmanager
    def delay(self, seconds: float):
        """Every frame takes so long from host to host, one way."""
        ends = [f"s{index}" for index in range(len(self.hosts))]
        for end in ends:
            self._switch.run("ip", "link", "set", end, "nomaster")
        wire = subprocess.Popen(
            self._switch.inside([sys.executable, str(WIRE), str(seconds), *ends]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert wire.stdout is not None and wire.stdout.readline() == b"ready\n"
            yield
        finally:
            wire.communicate()
            for index in range(len(ends)):
                self._plug_in(index)

    def close(self) -> None:
        for made in reversed(self._made):
            made.close()


def environment(**variables: str) -> dict[str, str]:
    """Without a launcher's variables; with this Python's folder first on the PATH."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE") and not name.startswith(("MASTER_", "SLURM_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{SEARCH}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
