"""Whether every rank and node of a running cluster is alive.

SGLang notices neither a rank that is stopped nor a peer that is gone: requests then hang for minutes without a word.
Four signs are watched, the quick ones first: the end of a process (its pidfd), a stopped process (state T), the
rank's heartbeat file, and each node's /health.
"""

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kvtuner_sglang.serving.abort import Abort
from kvtuner_sglang.serving.client import answers_health
from kvtuner_sglang.serving.launcher import NodeProcess

POLL_S = 0.2
STOPPED_GRACE_S = 5.0  # a stop shorter than this may be a debugger's; a frozen peer stops everything anyway
HEALTH_EVERY_S = 5.0
HEALTH_TIMEOUT_S = 20.0
JOIN_S = 1.0  # the thread that asks /health may still wait for its answer; nothing depends on it
SGLANG_TITLE = "sglang::"


@dataclass(frozen=True)
class Watched:
    """One process that the cluster cannot do without. `rank` is None for a node's launcher and its detokenizer."""

    name: str
    pid: int
    log_path: Path
    rank: int | None = None


class Liveness:
    """Watches in two threads of its own until `stop`; sets `abort` with a sentence naming rank or node."""

    def __init__(self, nodes: Sequence[NodeProcess], ranks: Sequence[dict[str, Any]], heartbeat_dir: Path,
                 timeout_s: float, abort: Abort) -> None:
        self._nodes, self._abort, self._timeout_s = tuple(nodes), abort, timeout_s
        self._watched = watched_processes(nodes, ranks)
        self._beats = Heartbeats(heartbeat_dir, [w for w in self._watched if w.rank is not None])
        self._stopped_since_s: dict[int, float] = {}
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=(watch,), daemon=True)
                         for watch in (self._watch_processes, self._watch_health)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(JOIN_S)

    def _guarded(self, watch: Callable[[], None]) -> None:
        try:
            watch()
        except Exception as error:
            # A watch that ended would let a frozen rank hang the run for ever.
            self._abort.set(f"the liveness check itself failed ({error!r})")
            raise

    def _watch_processes(self) -> None:
        with contextlib.ExitStack() as opened:
            by_fd: dict[int, Watched] = {}
            poll = select.poll()
            for watched in self._watched:
                try:
                    fd = os.pidfd_open(watched.pid)
                except ProcessLookupError:
                    self._abort.set(f"{watched.name} died")
                    return
                opened.callback(os.close, fd)
                by_fd[fd] = watched
                poll.register(fd, select.POLLIN)
            while not self._done.is_set() and not self._abort.is_set():
                dead = [by_fd[fd].name for fd, _ in poll.poll(POLL_S * 1000)]
                if dead:
                    self._abort.set(f"{', '.join(sorted(dead))} died")
                    return
                self._look_for_frozen()

    def _look_for_frozen(self) -> None:
        now = time.monotonic()
        for watched in self._watched:
            if process_state(watched.pid) not in ("T", "t"):
                self._stopped_since_s.pop(watched.pid, None)
            elif now - self._stopped_since_s.setdefault(watched.pid, now) > STOPPED_GRACE_S:
                self._abort.set(f"{watched.name} has been stopped (SIGSTOP) for {STOPPED_GRACE_S:.0f} s")
                return
        silent = self._beats.oldest()
        if silent is not None and silent[1] > self._timeout_s:
            self._abort.set(f"{silent[0].name} gave no sign of life for {silent[1]:.0f} s")

    def _watch_health(self) -> None:
        answered_s = {node.name: time.monotonic() for node in self._nodes}
        while not self._done.wait(HEALTH_EVERY_S) and not self._abort.is_set():
            for node in self._nodes:
                if answers_health(node.command.url, min(HEALTH_TIMEOUT_S, self._timeout_s)):
                    answered_s[node.name] = time.monotonic()
                elif (age_s := time.monotonic() - answered_s[node.name]) > self._timeout_s:
                    self._abort.set(f"{node.name} did not answer /health for {age_s:.0f} s")


class Heartbeats:
    """How long ago each rank's file last changed, by this process's own clock: no two clocks are compared."""

    def __init__(self, folder: Path, ranks: Sequence[Watched]) -> None:
        now = time.monotonic()
        self._folder, self._ranks = folder, ranks
        self._seen: dict[int, tuple[str, float]] = {w.pid: ("", now) for w in ranks}

    def oldest(self) -> tuple[Watched, float] | None:
        """The rank that has been silent longest and for how many seconds; None without ranks."""
        now = time.monotonic()
        for watched in self._ranks:
            text = _read(self._folder / f"rank{watched.rank}.json")
            if text is not None and text != self._seen[watched.pid][0]:
                self._seen[watched.pid] = (text, now)
        ages = [(w, now - self._seen[w.pid][1]) for w in self._ranks]
        return max(ages, key=lambda pair: pair[1], default=None)


def watched_processes(nodes: Sequence[NodeProcess], ranks: Sequence[dict[str, Any]]) -> list[Watched]:
    """Every rank that /server_info names, every node's launcher, and SGLang's other processes (the detokenizer)."""
    by_node = {node.command.node_rank: node for node in nodes}
    found = [
        Watched(f"rank {r['rank']} (node {r['node_rank']}, pid {r['pid']})", r["pid"],
                by_node[r["node_rank"]].log_path, r["rank"])
        for r in ranks
    ]
    known = {w.pid for w in found}
    for node in nodes:
        found.append(Watched(f"{node.name} (pid {node.process.pid})", node.process.pid, node.log_path))
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(node.process.pid).children(recursive=True):
                title = " ".join(child.cmdline())
                if child.pid not in known and title.startswith(SGLANG_TITLE):
                    found.append(Watched(f"{title.strip()} of {node.name} (pid {child.pid})", child.pid, node.log_path))
    return found


def process_state(pid: int) -> str | None:
    """The letter of the process's state in /proc (R, S, D, T, Z ...), or None if it is gone."""
    text = _read(Path(f"/proc/{pid}/stat"))
    return None if text is None else text.rpartition(")")[2].split()[0]


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
