"""Ending real process trees that do not want to end."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from kvtuner_sglang.serving.launcher import RUN_MARK
from kvtuner_sglang.serving.teardown import stop_nodes, termination_raises

pytestmark = pytest.mark.alone
EVERYTHING = ("child", "session", "orphan")


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_willing_tree_ends_before_the_grace_is_over(start_tree) -> None:
    node, pids = start_tree("child")
    started = time.monotonic()
    stop_nodes([node], grace_s=30, limit_s=60)
    assert time.monotonic() - started < 30
    assert not any(map(alive, pids.values()))


def test_a_tree_that_ignores_sigterm_and_left_its_session_is_gone_within_10_s(start_tree) -> None:
    node, pids = start_tree("deaf", *EVERYTHING)
    assert all(map(alive, pids.values()))
    started = time.monotonic()
    stop_nodes([node])
    assert time.monotonic() - started < 10
    assert not any(map(alive, pids.values()))


def test_a_stopped_tree_is_ended(start_tree) -> None:
    node, pids = start_tree("deaf", "child", "session")
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    stop_nodes([node], grace_s=0.5)
    assert not any(map(alive, pids.values()))


def test_what_a_dead_node_left_behind_is_ended(start_tree) -> None:
    node, pids = start_tree("deaf", *EVERYTHING)
    os.kill(pids["main"], signal.SIGKILL)
    node.process.wait(5)
    stop_nodes([node], grace_s=0.5)
    assert not any(map(alive, pids.values()))


def test_other_processes_are_left_alone(start_tree) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                             env={**os.environ, RUN_MARK: "another run"})
    try:
        node, _ = start_tree("deaf", *EVERYTHING)
        stop_nodes([node], grace_s=0.2)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


PARENT = """
    import sys, time
    from pathlib import Path
    from kvtuner_sglang.serving.commands import NodeCommand
    from kvtuner_sglang.serving.launcher import start_node
    from kvtuner_sglang.serving.teardown import stop_nodes, termination_raises

    with termination_raises():
        node = start_node(NodeCommand(0, (sys.executable, sys.argv[1], sys.argv[2], "deaf", "child", "session"), {},
                                      "127.0.0.1", 9), Path(sys.argv[2]) / "log", "mark")
        try:
            time.sleep(60)
        finally:
            stop_nodes([node], grace_s=0.5)
"""


@pytest.mark.parametrize(("number", "roles"), [
    (signal.SIGINT, ("main", "child", "session")),
    (signal.SIGTERM, ("main", "child", "session")),
    (signal.SIGHUP, ("main", "child", "session")),
    (signal.SIGKILL, ("main",)),  # nobody is left to clean up, but the node itself dies with its parent
])
def test_when_the_runner_itself_is_ended(tmp_path: Path, hear_ctrl_c, number: signal.Signals,
                                         roles: tuple[str, ...]) -> None:
    stubborn = Path(__file__).with_name("stubborn.py")
    runner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PARENT), str(stubborn), str(tmp_path)],
                              stderr=subprocess.DEVNULL, preexec_fn=hear_ctrl_c)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"{role}.pid").exists() for role in ("main", "child", "session")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = {role: int((tmp_path / f"{role}.pid").read_text()) for role in ("main", "child", "session")}
    try:
        runner.send_signal(number)
        runner.wait(10)
        time.sleep(0.2)
        assert not any(alive(pids[role]) for role in roles)
    finally:
        for pid in pids.values():
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination_raises():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(SystemExit) as stop:
                signal.raise_signal(signal.SIGTERM)
        assert stop.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
