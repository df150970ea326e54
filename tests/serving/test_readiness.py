"""Waiting for a server that cannot come: the cause, soon."""

import os
import sys
from pathlib import Path

import pytest

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.serving import readiness
from kvtuner_sglang.serving.commands import NodeCommand
from kvtuner_sglang.serving.launcher import NodeProcess, start_node
from kvtuner_sglang.serving.readiness import wait_until_ready
from kvtuner_sglang.serving.teardown import stop_nodes

SLEEP = "import time; time.sleep(60)"
LOADING = "print('[2026-11-22 23:47:10] Load weight begin.', flush=True); " + SLEEP


@pytest.fixture
def start(tmp_path: Path):
    nodes: list[NodeProcess] = []

    def start(*programs: str) -> list[NodeProcess]:
        for rank, program in enumerate(programs):
            command = NodeCommand(rank, (sys.executable, "-c", program), {}, "127.0.0.1", 9)
            nodes.append(start_node(command, tmp_path / f"node{rank}.log", os.urandom(4).hex()))
        return nodes

    yield start
    stop_nodes(nodes)


def test_a_refusal_of_any_node_is_the_sentence(start) -> None:
    nodes = start(SLEEP, "import sys; sys.exit('kvtuner: rank 2 has other flags: give the same.')")
    with pytest.raises(RunFailed, match=r"^rank 2 has other flags: give the same\.$"):
        wait_until_ready(nodes, 60, lambda _: None)


def test_a_refusal_ends_the_wait_though_the_process_hangs(start) -> None:
    nodes = start("print('kvtuner: no.', flush=True); " + SLEEP)
    with pytest.raises(RunFailed, match=r"^no\.$"):
        wait_until_ready(nodes, 60, lambda _: None)


def test_a_crash_names_node_error_and_log(start) -> None:
    peer = "raise RuntimeError('Connection closed by peer')"
    nodes = start(peer, "import sys; print('x'); raise OSError('no such model')")
    with pytest.raises(RunFailed) as caught:
        wait_until_ready(nodes, 60, lambda _: None)
    assert str(caught.value) == (f"node 1 ended with exit code 1 (OSError: no such model): see {nodes[1].log_path}.")


def test_a_wait_is_bounded_and_says_what_it_waits_for(start, monkeypatch) -> None:
    monkeypatch.setattr(readiness, "SAY_EVERY_S", 0.5)
    nodes, said = start(LOADING), []
    with pytest.raises(RunFailed, match=r"not ready after .* Load weight begin\..* raise server\.start_timeout_s\.$"):
        wait_until_ready(nodes, 2.0, said.append)
    assert any("node 0: Load weight begin." in line for line in said)
