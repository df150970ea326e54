"""A running server of one or more nodes, from its ports to the last process gone."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.errors import RunFailed, UserError
from kvtuner_sglang.serving.abort import Abort
from kvtuner_sglang.serving.checkpoint import Checkpoint
from kvtuner_sglang.serving.client import server_info
from kvtuner_sglang.serving.commands import Measurement, NodeCommand, node_commands, write_commands
from kvtuner_sglang.serving.launcher import NodeProcess, start_nodes
from kvtuner_sglang.serving.liveness import Liveness
from kvtuner_sglang.serving.ports import choose_ports
from kvtuner_sglang.serving.readiness import wait_until_ready
from kvtuner_sglang.serving.teardown import stop_nodes, termination_raises
from kvtuner_sglang.serving.verify import verify_server

# A request can fail a moment before the watching thread has seen why.
BLAME_WAIT_S = 3.0


@dataclass(frozen=True)
class Cluster:
    """What a measurement needs. `server_info` is the verified answer of node 0; `abort` ends requests in flight."""

    commands: tuple[NodeCommand, ...]
    server_info: dict[str, Any]
    start_seconds: float
    log_paths: tuple[Path, ...]
    abort: Abort

    @property
    def base_url(self) -> str:
        """Node 0: the only one that serves."""
        return self.commands[0].url

    @property
    def node_urls(self) -> tuple[str, ...]:
        return tuple(command.url for command in self.commands)

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """Each rank's state as the plugin reports it, in rank order."""
        return self.server_info["kvtuner"]["ranks"]

    def check(self, wait_s: float = 0.0) -> None:
        """Raise RunFailed naming the rank or node if one died or froze, now or within `wait_s` seconds."""
        if self.abort.wait(wait_s) or self.abort.is_set():
            raise RunFailed(f"{self.abort.reason}: see {self.log_paths[0].parent}.")


@contextlib.contextmanager
def running_cluster(config: RunConfig, checkpoint: Checkpoint, run_dir: Path, say: Callable[[str], None],
                    measurement: Measurement | None = None) -> Iterator[Cluster]:
    """Start, verify and watch the nodes that `config` asks for; leaves no process, however the block is left.

    Writes commands/node<i>.sh and logs/node<i>.log under `run_dir`. Raises UserError if it cannot start, RunFailed if
    it does not become ready, is not what was asked for, or loses a rank while the block runs.
    """
    heartbeat_dir = run_dir.resolve() / "heartbeat"  # absolute: a node's script may be pasted anywhere
    commands = node_commands(config, checkpoint, choose_ports(config.dist), heartbeat_dir, measurement)
    write_commands(commands, run_dir / "commands")
    _clear(heartbeat_dir)
    nodes: list[NodeProcess] = []
    with termination_raises():
        try:
            start_nodes(commands, run_dir / "logs", nodes)
            seconds = wait_until_ready(nodes, config.server.start_timeout_s, say)
            info = server_info(commands[0].url)
            verify_server(info, config, checkpoint, measurement)
            say(f"{seconds:4.0f} s, server ready at {commands[0].url}, {config.dist.ranks} ranks verified")
            cluster = Cluster(commands, info, seconds, tuple(n.log_path for n in nodes), Abort())
            with _watched(cluster, nodes, heartbeat_dir, config.server.liveness_timeout_s):
                yield cluster
        finally:
            stop_nodes(nodes)
            _clear(heartbeat_dir)


@contextlib.contextmanager
def _watched(cluster: Cluster, nodes: list[NodeProcess], heartbeat_dir: Path, timeout_s: float) -> Iterator[None]:
    """Run the block under the liveness check; a lost rank is the reason of whatever else fails in it."""
    liveness = Liveness(nodes, cluster.ranks, heartbeat_dir, timeout_s, cluster.abort)
    liveness.start()
    try:
        yield
        cluster.check()
    except Exception:
        # A failure that comes from a lost rank names the rank; the rest stays what it is.
        cluster.check(wait_s=BLAME_WAIT_S)
        raise
    finally:
        liveness.stop()


def _clear(heartbeat_dir: Path) -> None:
    try:
        if heartbeat_dir.exists():
            shutil.rmtree(heartbeat_dir)
    except OSError as error:
        raise UserError(f"{heartbeat_dir} cannot be removed ({error.strerror}): choose another runs_dir.") from error


