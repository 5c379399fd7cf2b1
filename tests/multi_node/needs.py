"""What the multi-node test needs of this machine: `python tests/multi_node/needs.py`.

Prints what is missing and exits with 1, or prints nothing. Standard library only.
"""

import os
import shutil
import subprocess
import sys

PROGRAMS = ["ip", "unshare", "nsenter", "ssh", "ssh-keygen", "sshd", "pdsh"]
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
NAMESPACES = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
TRIAL = "ip link add end-0 type veth peer name end-1 && ip link add switch type bridge"


def program(name: str) -> str:
    """Where a program is, in the folders of the system too."""
    found = shutil.which(name, path=SEARCH)
    if found is None:
        raise FileNotFoundError(name)
    return found


def missing() -> str:
    """Why the test cannot run here, "" if it can."""
    if sys.platform != "linux":
        return "not Linux"
    if os.geteuid() != 0:
        return "not root, who alone may make network namespaces"
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if absent:
        return f"no {', '.join(absent)} (apt-get install iproute2 openssh-server pdsh)"
    command = [*NAMESPACES, "sh", "-c", TRIAL]
    trial = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": SEARCH}
    )
    if trial.returncode:
        why = (trial.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"no network namespaces with veth and bridge ({why})"
    return ""


if __name__ == "__main__":
    why = missing()
    if why:
        print(why)
    sys.exit(bool(why))
