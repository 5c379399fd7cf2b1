"""The setting `interface` in a plain session: listened on, or refused by name."""

import socket

import pytest

import dist_int8
from dist_int8.distributed import interfaces

OPTIONS = {"devices": ["cpu", "cpu"], "max_tokens": 64, "progress": False}


def other_interface():
    """An interface of this machine that has an address and is not loopback, if there is one."""
    for _, name in socket.if_nameindex():
        try:
            address = interfaces.find_address({"interface": name})
        except ValueError:
            continue
        if name != "lo" and ":" not in address:
            return name, address
    return None


@pytest.mark.parametrize("where", ["lo", "other", None])
def test_ranks_listen_on_the_interface(tiny_llama, where):
    if where == "other" and other_interface() is None:
        pytest.skip("this machine has no interface with an address but loopback")
    name, address = other_interface() if where == "other" else (where, "127.0.0.1")
    with dist_int8.load(tiny_llama, interface=name, **OPTIONS) as model:
        world = model._engine.pipeline.world
        assert world.monitor.address.split()[0] == address
        link = world.monitor.peers[1].link.connection
        assert link.getsockname()[0] == link.getpeername()[0] == address
        assert address in world.listen_on.get("hostname", address)
        assert world.listen_on == ({"interface": name} if name else {"hostname": "127.0.0.1"})
        assert len(model.generate([[1, 2]], max_new_tokens=2)[0].token_ids) == 2


@pytest.mark.parametrize("more", [{}, {"devices": ["cpu"]}, {"in_process": True}])
def test_an_interface_that_is_not_there_is_refused_before_the_model_is_read(tmp_path, more):
    with pytest.raises(
        ValueError, match=r"interface must be an interface of this machine .*'nope'"
    ):
        dist_int8.load(tmp_path / "no such model", **OPTIONS | more, interface="nope")


@pytest.mark.parametrize(
    ("more", "why"),
    [({"devices": ["cpu"]}, "a single stage"), ({"in_process": True}, "in_process")],
)
def test_an_interface_on_which_nothing_would_listen_is_refused(tiny_llama, more, why):
    with pytest.raises(ValueError, match=f"interface must be left out with {why}, got 'lo'"):
        dist_int8.load(tiny_llama, **OPTIONS | more, interface="lo")
