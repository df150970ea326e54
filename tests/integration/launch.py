"""Plain `python -m sglang.launch_server` processes, as a user of the plugin alone starts them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from kvtuner_sglang.cpu_engine.environment import cpu_server_arguments, cpu_server_environment

LAUNCH = (sys.executable, "-m", "sglang.launch_server")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass
class Node:
    process: subprocess.Popen[bytes]
    log: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def sentences(self) -> list[str]:
        return [line for line in self.text().splitlines() if line.startswith("kvtuner: ")]


def members(group: int) -> list[int]:
    """Live processes whose process group, session or launcher is `group`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            in_group = group in (os.getpgid(process.pid), os.getsid(process.pid))
            if in_group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def other_plugin(folder: Path, changes: str) -> dict[str, str]:
    """An installed plugin that is ours but for `changes`, indented code that runs before it registers.

    Returns the environment that makes SGLang load it instead.
    """
    (folder / "broken_kvtuner.py").write_text(f"""
import kvtuner_sglang
from kvtuner_sglang.plugin import entry

def register():
{changes}
    entry.register()
""")
    info = folder / "broken_kvtuner-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken_kvtuner\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nbroken = broken_kvtuner:register\n")
    path = [cpu_server_environment(1, 1, 0)["PYTHONPATH"], str(folder)]
    return {"SGLANG_PLUGINS": "broken", "PYTHONPATH": os.pathsep.join(path)}


@contextlib.contextmanager
def nodes(
    model: Path,
    flags: Sequence[Sequence[str]],
    log_dir: Path,
    *,
    tp: int = 1,
    launch: Sequence[str] = LAUNCH,
    environments: Sequence[dict[str, str]] | None = None,
    arguments: Sequence[str] = tuple(cpu_server_arguments()),
    device: Sequence[str] = ("--device", "cpu", "--dtype", "float32"),
) -> Iterator[list[Node]]:
    """One launcher per entry of `flags`, in sessions of their own; whatever is left of them is killed at the end."""
    started: list[Node] = []
    try:
        for rank, words in enumerate(flags):
            port, log = free_port(), log_dir / f"node{rank}.log"
            environment = cpu_server_environment(tp, tp * len(flags), rank) if "cpu" in device else {}
            extra = environments[rank] if environments else {}
            command = [
                *launch,
                "--model-path",
                str(model),
                *device,
                "--port",
                str(port),
                *arguments,
                *words,
            ]
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command, stdout=out, stderr=out, start_new_session=True, env={**os.environ, **environment, **extra}
                )
            started.append(Node(process, log, port))
        yield started
    finally:
        for node in started:
            for pid in [*members(node.process.pid), node.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            node.process.wait()


def wait_ready(node: Node, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if node.process.poll() is not None:
            raise AssertionError(f"the server ended with {node.process.returncode}:\n{node.text()[-3000:]}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{node.url}/health", timeout=20).status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"not ready within {timeout_s} s:\n{node.text()[-3000:]}")


def wait_ended(started: Sequence[Node], timeout_s: float) -> list[int]:
    """Exit codes of all launchers; raises AssertionError if one runs on or leaves a process behind."""
    deadline = time.monotonic() + timeout_s
    codes = [node.process.wait(max(deadline - time.monotonic(), 0.1)) for node in started]
    while left := [pid for node in started for pid in members(node.process.pid)]:
        assert time.monotonic() < deadline, f"processes {left} are left"
        time.sleep(0.2)
    return codes
