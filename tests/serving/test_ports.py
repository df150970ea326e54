"""Ports: a given one that is in use is refused before anything starts, chosen ones do not meet."""

import socket
from dataclasses import replace

import pytest

from kvtuner_sglang.config import DistConfig
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.serving.ports import DERIVED_FROM_DIST, DERIVED_FROM_HTTP, choose_ports, is_free

TWO_NODES = DistConfig("tp2pp2", 2, 2, 2, "local", ("127.0.0.1", "127.0.0.1"), (0, 0), 0, "lo")
ONE_NODE = DistConfig("single", 1, 1, 1, "local", ("127.0.0.1",), (0,), 0, "lo")


@pytest.fixture
def busy_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("field", ["http_ports", "dist_port"])
def test_a_port_in_use_is_refused(busy_port: int, field: str) -> None:
    given = {"http_ports": {"http_ports": (0, busy_port)}, "dist_port": {"dist_port": busy_port}}[field]
    with pytest.raises(UserError, match=f"port {busy_port} is in use on 127.0.0.1"):
        choose_ports(replace(TWO_NODES, **given))


def test_a_port_in_use_on_any_address_is_found() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        assert not is_free("127.0.0.1", listener.getsockname()[1])


def test_a_port_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="given twice"):
        choose_ports(replace(TWO_NODES, http_ports=(23456, 23456)))


def test_a_foreign_address_is_refused() -> None:
    with pytest.raises(UserError, match=r"192\.0\.2\.1 is not an address of this machine"):
        choose_ports(replace(ONE_NODE, hosts=("192.0.2.1",)))


def test_given_ports_are_kept() -> None:
    given = choose_ports(TWO_NODES)
    ports = choose_ports(replace(TWO_NODES, http_ports=given.http, dist_port=given.dist))
    assert ports == given


def test_one_node_leaves_the_rendezvous_to_sglang_unless_told() -> None:
    assert choose_ports(ONE_NODE).dist is None
    free = choose_ports(TWO_NODES).dist
    assert choose_ports(replace(ONE_NODE, dist_port=free)).dist == free


def test_chosen_ports_and_those_sglang_derives_are_free_and_differ() -> None:
    ports = choose_ports(TWO_NODES)
    derived = [p + d for p in ports.http for d in DERIVED_FROM_HTTP] + [ports.dist + d for d in DERIVED_FROM_DIST]
    assert len(set(derived)) == len(derived)
    assert all(is_free("127.0.0.1", p) for p in derived)


def test_two_runs_choose_differently() -> None:
    assert len({choose_ports(TWO_NODES) for _ in range(5)}) == 5
