"""On which address this rank listens for the others: loopback, unless they are on other machines.

Connections between ranks carry neither password nor encryption, so they are offered no wider than
needed. Imports nothing of ours and no torch.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

LOOPBACK_ADDRESS = "127.0.0.1"
LOOPBACK_NAMES = (LOOPBACK_ADDRESS, "localhost", "::1")
VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_LINK_LOCAL = "20"  # scope of an IPv6 address in /proc/net/if_inet6


def on_one_machine(environment: Mapping[str, str]) -> bool:
    """Whether a launcher's environment says that every rank runs on this machine."""
    if environment.get("MASTER_ADDR", LOOPBACK_ADDRESS) in LOOPBACK_NAMES:
        return True
    here = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    return here is not None and here == environment.get("WORLD_SIZE")


def choose(setting: str | None, one_machine: bool) -> dict[str, str]:
    """Where gloo listens: {"interface": name} or {"hostname": address}; NCCL is told the same.

    The `interface` setting comes first. Without it ranks of one machine use loopback; across
    machines GLOO_SOCKET_IFNAME counts, else the address from which this machine reaches
    MASTER_ADDR. The address of the host's name, which gloo would take, is loopback on many
    machines and another network's on others. NCCL_SOCKET_IFNAME stays as it is where it is set.

    Raises:
        ValueError: there is no such interface, or no way to MASTER_ADDR.
    """
    if setting is not None:
        check(setting)
        _tell_nccl(setting)
        return {"interface": setting}
    if one_machine:
        _tell_nccl("lo")
        return {"hostname": LOOPBACK_ADDRESS}
    name = os.environ.get(VARIABLE)
    if name:
        _check_exists(name, f"environment: {VARIABLE}", "unset it")
        return {"interface": name}
    return {"hostname": route_to(os.environ["MASTER_ADDR"])}


def check(setting: str) -> None:
    """Refuses a setting `interface` that names no interface of this machine.

    Raises:
        ValueError: there is no such interface, or it has no address.
    """
    _check_exists(setting, "load(): interface", "leave it out")
    find_address({"interface": setting})


def find_address(listen_on: dict[str, str]) -> str:
    """The address of what `choose` chose, for sockets of our own.

    Raises:
        ValueError: the interface has no address.
    """
    name = listen_on.get("interface")
    if name is None:
        return listen_on["hostname"]
    request = struct.pack("256s", name.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
        except OSError:  # IPv6 only, perhaps
            pass
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, _, _, scope, _, owner = line.split()
        if owner == name and scope != _LINK_LOCAL:
            return str(ipaddress.ip_address(bytes.fromhex(digits)))
    raise ValueError(
        f"load(): interface must have an address, got {name!r}, which has none; configure it or "
        "name another interface"
    )


def route_to(master: str) -> str:
    """This machine's address on the way to the rendezvous; nothing is sent.

    Raises:
        ValueError: there is no way, or the name means this machine's loopback.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            local = str(probe.getsockname()[0])
    except OSError as error:
        raise ValueError(
            "environment: MASTER_ADDR must be an address that this machine reaches, got "
            f"{master!r} ({error.strerror}); set it to the address of the machine of rank 0"
        ) from None
    if ipaddress.ip_address(local.split("%")[0]).is_loopback:
        raise ValueError(
            "environment: MASTER_ADDR must be an address that the other machines reach, got "
            f"{master!r}, which is {local} here; set it to this machine's address (/etc/hosts "
            f"often maps a host's own name to loopback), or name the interface with {VARIABLE}"
        )
    return local


def _tell_nccl(name: str) -> None:
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # = is an exact name, not a prefix


def _check_exists(name: str, source: str, otherwise: str) -> None:
    names = [known for _, known in socket.if_nameindex()]
    if name not in names:
        raise ValueError(
            f"{source} must be an interface of this machine ({', '.join(names)}), got {name!r}; "
            f"{otherwise} to use loopback on one machine, or the one that leads to MASTER_ADDR"
        )
