"""Where ranks listen: loopback on one machine, else what is configured or leads to MASTER_ADDR."""

import os
import socket

import pytest

from dist_int8.distributed import interfaces


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("MASTER_ADDR", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    # set and deleted, so that what `choose` leaves there is gone after the test
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "x")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"MASTER_ADDR": "localhost", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"MASTER_ADDR": "node-0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, True),
        ({"MASTER_ADDR": "node-0", "WORLD_SIZE": "4", "LOCAL_SIZE": "4"}, True),
        ({"MASTER_ADDR": "node-0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "node-0", "WORLD_SIZE": "4"}, False),
    ],
)
def test_one_machine_is_told_from_several(environment, expected):
    assert interfaces.on_one_machine(environment) is expected


def test_ranks_of_one_machine_use_loopback_whatever_gloo_was_told(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert interfaces.choose(None, one_machine=True) == {"hostname": "127.0.0.1"}
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"


def test_a_setting_wins_and_nccl_follows_unless_it_was_told(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "not there")
    assert interfaces.choose("lo", one_machine=False) == {"interface": "lo"}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    interfaces.choose("lo", one_machine=True)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"


def test_gloo_socket_ifname_counts_across_machines(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert interfaces.choose(None, one_machine=False) == {"interface": "lo"}
    assert "NCCL_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize("where", ["setting", "variable"])
def test_an_interface_that_is_not_there_is_named(monkeypatch, where):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    setting = "eth77" if where == "setting" else None
    names = ", ".join(name for _, name in socket.if_nameindex())
    with pytest.raises(ValueError, match=rf"an interface of this machine \({names}\), got 'eth77'"):
        interfaces.choose(setting, one_machine=False)


@pytest.mark.parametrize(
    ("master", "message"),
    [
        (
            "no-such-host.invalid",
            "an address that this machine reaches, got .no-such-host",
        ),
        ("127.0.1.1", "that the other machines reach, got '127.0.1.1', which is 127.0.0.1 here"),
    ],
)
def test_a_master_that_others_cannot_reach_is_named(monkeypatch, master, message):
    monkeypatch.setenv("MASTER_ADDR", master)
    with pytest.raises(ValueError, match=message):
        interfaces.choose(None, one_machine=False)


def test_address_of_what_was_chosen():
    assert interfaces.find_address({"hostname": "10.1.2.3"}) == "10.1.2.3"
    assert interfaces.find_address({"interface": "lo"}) in ("127.0.0.1", "::1")
