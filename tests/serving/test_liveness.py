"""Liveness against real processes that are killed, stopped and silent."""

import http.server
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from kvtuner_sglang.serving import liveness as module
from kvtuner_sglang.serving.abort import Abort
from kvtuner_sglang.serving.liveness import Liveness, process_state

pytestmark = pytest.mark.alone


class Beating(threading.Thread):
    """Writes the beat of one rank five times a second until stopped."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(daemon=True)
        folder.mkdir(exist_ok=True)
        self.path, self.silent = folder / f"rank{rank}.json", threading.Event()

    def run(self) -> None:
        count = 0
        while not self.silent.wait(0.2):
            draft = self.path.with_suffix(".tmp")
            draft.write_text(json.dumps({"count": (count := count + 1)}))
            draft.replace(self.path)


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def health_port():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def two_nodes(start_tree, tmp_path: Path, health_port: int):
    """Two nodes of one rank each (role child); yields nodes, ranks, beating threads, heartbeat folder."""
    nodes, ranks, beats = [], [], []
    for node_rank in range(2):
        node, pids = start_tree("child", node_rank=node_rank, http_port=health_port)
        nodes.append(node)
        ranks.append({"rank": node_rank, "node_rank": node_rank, "pid": pids["child"]})
        beats.append(Beating(tmp_path / "heartbeat", node_rank))
        beats[-1].start()
    yield nodes, ranks, beats, tmp_path / "heartbeat"
    for beat in beats:
        beat.silent.set()
        beat.join()


def watch(two_nodes, timeout_s: float) -> tuple[Liveness, Abort]:
    nodes, ranks, _, folder = two_nodes
    abort = Abort()
    liveness = Liveness(nodes, ranks, folder, timeout_s, abort)
    liveness.start()
    return liveness, abort


def test_all_well_stays_silent(two_nodes, monkeypatch) -> None:
    monkeypatch.setattr(module, "HEALTH_EVERY_S", 0.2)
    liveness, abort = watch(two_nodes, timeout_s=1.0)
    assert not abort.wait(2.5)
    liveness.stop()


def test_a_killed_rank_is_named_at_once(two_nodes) -> None:
    liveness, abort = watch(two_nodes, timeout_s=30)
    time.sleep(0.3)
    os.kill(two_nodes[1][1]["pid"], signal.SIGKILL)
    assert abort.wait(20)  # less than the 30 s after which silence alone would end it
    assert abort.reason == f"rank 1 (node 1, pid {two_nodes[1][1]['pid']}) died"
    liveness.stop()


def test_the_first_of_two_deaths_is_named(two_nodes) -> None:
    liveness, abort = watch(two_nodes, timeout_s=30)
    time.sleep(0.3)
    os.kill(two_nodes[1][0]["pid"], signal.SIGKILL)
    time.sleep(0.05)
    os.kill(two_nodes[1][1]["pid"], signal.SIGKILL)
    assert abort.wait(5)
    assert "rank 0" in abort.reason
    assert "rank 1" not in abort.reason
    liveness.stop()


def test_a_killed_node_is_named(two_nodes) -> None:
    liveness, abort = watch(two_nodes, timeout_s=30)
    time.sleep(0.3)
    os.kill(two_nodes[0][1].process.pid, signal.SIGKILL)
    assert abort.wait(5)
    assert abort.reason.startswith("node 1 (pid")
    liveness.stop()


def test_a_rank_dead_before_the_watch_began_is_found(two_nodes) -> None:
    nodes, _ranks, _, _ = two_nodes
    os.kill(nodes[0].process.pid, signal.SIGKILL)
    nodes[0].process.wait()
    liveness, abort = watch(two_nodes, timeout_s=30)
    assert abort.wait(5)
    assert abort.reason.startswith("node 0")
    liveness.stop()


def test_a_stopped_rank_is_named_and_not_its_silent_peer(two_nodes, monkeypatch) -> None:
    monkeypatch.setattr(module, "STOPPED_GRACE_S", 0.5)
    liveness, abort = watch(two_nodes, timeout_s=2.0)
    two_nodes[2][0].silent.set()  # the peer blocks in a collective and is silent, too
    pid = two_nodes[1][1]["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert abort.wait(5)
    assert abort.reason.startswith(f"rank 1 (node 1, pid {pid}) has been stopped")
    liveness.stop()


def test_a_short_stop_is_forgiven(two_nodes, monkeypatch) -> None:
    monkeypatch.setattr(module, "STOPPED_GRACE_S", 1.0)
    liveness, abort = watch(two_nodes, timeout_s=30)
    pid = two_nodes[1][0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.4)
    assert process_state(pid) == "T"
    os.kill(pid, signal.SIGCONT)
    assert not abort.wait(1.5)
    liveness.stop()


def test_a_silent_rank_is_named(two_nodes) -> None:
    liveness, abort = watch(two_nodes, timeout_s=1.0)
    time.sleep(0.5)
    two_nodes[2][1].silent.set()
    assert abort.wait(5)
    assert abort.reason.startswith("rank 1")
    assert "no sign of life" in abort.reason
    liveness.stop()


def test_a_rank_that_never_beat_is_named(two_nodes) -> None:
    nodes, ranks, _, folder = two_nodes
    abort = Abort()
    liveness = Liveness(nodes, [ranks[0], {**ranks[1], "rank": 7}], folder, 1.0, abort)
    liveness.start()
    assert abort.wait(5)
    assert abort.reason.startswith("rank 7")
    liveness.stop()


def test_a_node_that_does_not_answer_is_named(start_tree, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "HEALTH_EVERY_S", 0.1)
    node, _ = start_tree("child")  # nobody listens on its port
    abort = Abort()
    liveness = Liveness([node], [], tmp_path, 0.5, abort)
    liveness.start()
    assert abort.wait(5)
    assert abort.reason.startswith("node 0 did not answer /health")
    liveness.stop()


def test_process_state_of_nobody() -> None:
    assert process_state(2**22 + 1) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_watch_that_fails_ends_the_run(start_tree, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "process_state", lambda _pid: 1 / 0)
    node, _ = start_tree()
    abort = Abort()
    liveness = Liveness([node], [], tmp_path, 30.0, abort)
    liveness.start()
    assert abort.wait(5)
    assert "the liveness check itself failed (ZeroDivisionError" in abort.reason
    liveness.stop()
