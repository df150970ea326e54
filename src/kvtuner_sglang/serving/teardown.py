"""Ends every process of a cluster, whatever it does: within seconds, and verified."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import psutil

from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.serving.launcher import RUN_MARK, NodeProcess

GRACE_S = 2.0  # SGLang drains for five seconds and more; nothing of ours depends on its farewell
LIMIT_S = 10.0
REAP_S = 2.0
POLL_S = 0.05
Handler = Callable[[int, FrameType | None], None] | signal.Handlers


def stop_nodes(nodes: Sequence[NodeProcess], grace_s: float = GRACE_S, limit_s: float = LIMIT_S) -> None:
    """SIGTERM, `grace_s` seconds, SIGKILL; raises RunFailed if a process outlives `limit_s` seconds in all."""
    with _signals_held():
        _stop(nodes, grace_s, time.monotonic() + limit_s)


def _stop(nodes: Sequence[NodeProcess], grace_s: float, deadline: float) -> None:
    known: set[psutil.Process] = set()
    _find(nodes, known)
    _signal_groups(nodes, signal.SIGTERM)
    for process in known:
        # A stopped process sees SIGTERM only once it runs again.
        _send(process, signal.SIGCONT)
    _wait(known, nodes, min(time.monotonic() + grace_s, deadline))
    # Twice and more: a process may fork between the look and the signal.
    while _find(nodes, known):
        _signal_groups(nodes, signal.SIGKILL)
        for process in known:
            _send(process, signal.SIGKILL)
        _wait(known, nodes, min(time.monotonic() + 0.5, deadline))
        if time.monotonic() >= deadline and (left := _find(nodes, known)):
            pids = ", ".join(str(p.pid) for p in left)
            raise RunFailed(f"processes {pids} could not be ended: end them by hand before the next run.")
    # The dead are shown until their new parent, init, has collected them; an init that never does is not waited for.
    reaped_by = min(time.monotonic() + REAP_S, deadline)
    while any(psutil.pid_exists(p.pid) for p in known) and time.monotonic() < reaped_by:
        time.sleep(POLL_S)


def _find(nodes: Sequence[NodeProcess], known: set[psutil.Process]) -> list[psutil.Process]:
    """Add every living process of the nodes to `known`; returns those alive."""
    for node in nodes:
        node.process.poll()  # reaps it, so that it does not stay as a zombie
        if node.process.returncode is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                known.add(psutil.Process(node.process.pid))
    for process in list(known):
        with contextlib.suppress(psutil.NoSuchProcess):
            known.update(process.children(recursive=True))
    known.update(_marked({node.mark for node in nodes}))
    return [p for p in known if _alive(p)]


def _marked(marks: set[str]) -> Iterator[psutil.Process]:
    """Processes that carry the run's mark: also those that left the group and whose parent is gone."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(RUN_MARK) in marks:
                yield process


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal_groups(nodes: Sequence[NodeProcess], number: signal.Signals) -> None:
    for node in nodes:
        # The group is as old as its leader's pid; it cannot be another's while one member lives.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(node.process.pid, number)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)  # psutil checks that the pid was not given to another process


def _wait(known: set[psutil.Process], nodes: Sequence[NodeProcess], deadline: float) -> None:
    while time.monotonic() < deadline:
        for node in nodes:
            node.process.poll()
        if not any(_alive(p) for p in known):
            return
        time.sleep(POLL_S)


@contextlib.contextmanager
def signals_handled(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Inside, `handler` hears these signals but for those that are ignored, as under nohup; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: found for number in numbers if (found := signal.getsignal(number)) is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


def _signals_held() -> contextlib.AbstractContextManager[None]:
    """A second Ctrl-C must not interrupt the cleaning up that the first one began; it is bounded anyway."""
    return signals_handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM)


def termination_raises() -> contextlib.AbstractContextManager[None]:
    """SIGTERM and SIGHUP end this process through its `finally` blocks, as Ctrl-C does; main thread only."""
    return signals_handled(_exit, signal.SIGTERM, signal.SIGHUP)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
