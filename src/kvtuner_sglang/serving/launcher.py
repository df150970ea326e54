"""Starts the nodes of one cluster on this host, each as a process group of its own."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.serving.commands import NodeCommand

PR_SET_PDEATHSIG = 1
# Every process of a run inherits it: what is reparented or left the group is still found.
RUN_MARK = "KVTUNER_RUN_MARK"
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: the child between fork and exec may not import


@dataclass(frozen=True)
class NodeProcess:
    """A started node. `mark` is the value of RUN_MARK that its processes carry."""

    command: NodeCommand
    process: "subprocess.Popen[bytes]"
    log_path: Path
    mark: str = field(repr=False)

    @property
    def name(self) -> str:
        return f"node {self.command.node_rank}"


def start_node(command: NodeCommand, log_path: Path, mark: str) -> NodeProcess:
    """Start one node, its output to `log_path`; raises UserError if that cannot be written."""
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = log_path.open("wb")
    except OSError as error:
        raise UserError(f"{log_path} cannot be written ({error.strerror}): choose another runs_dir.") from error
    with log:
        process = subprocess.Popen(
            command.argv,
            env={**os.environ, **command.environment, RUN_MARK: mark},
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
            # Should this process be killed itself, the node goes too, and SGLang's ranks follow their node.
            preexec_fn=_die_with_parent,
        )
    return NodeProcess(command, process, log_path, mark)


def start_nodes(commands: Sequence[NodeCommand], logs: Path, started: list[NodeProcess]) -> None:
    """Start every node; each is appended to `started` at once, so that a failure in between can be cleaned up."""
    mark = os.urandom(8).hex()
    for command in commands:
        started.append(start_node(command, logs / f"node{command.node_rank}.log", mark))


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
