"""Real process trees in the place of nodes."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from kvtuner_sglang.config import RunConfig, parse
from kvtuner_sglang.serving.checkpoint import Checkpoint
from kvtuner_sglang.serving.commands import NodeCommand
from kvtuner_sglang.serving.launcher import NodeProcess, start_node

CONF = Path(__file__).parents[2] / "conf"
STUBBORN = Path(__file__).with_name("stubborn.py")


@pytest.fixture
def start_tree(tmp_path: Path) -> Iterator[Callable[..., tuple[NodeProcess, dict[str, int]]]]:
    """start(*words, node_rank=0) -> the node and the pid of each of its roles; see stubborn.py."""
    pids: list[int] = []

    def start(*words: str, node_rank: int = 0, http_port: int = 9) -> tuple[NodeProcess, dict[str, int]]:
        folder = tmp_path / f"tree{node_rank}"
        folder.mkdir()
        argv = (sys.executable, str(STUBBORN), str(folder), *words)
        command = NodeCommand(node_rank, argv, {}, "127.0.0.1", http_port)
        node = start_node(command, tmp_path / "logs" / f"node{node_rank}.log", os.urandom(8).hex())
        roles = ["main", *(w for w in words if w != "deaf")]
        wait_until(lambda: all((folder / f"{role}.pid").exists() for role in roles))
        found = {role: int((folder / f"{role}.pid").read_text()) for role in roles}
        pids.extend(found.values())
        return node, found

    yield start
    for pid in pids:
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def compose() -> Callable[..., RunConfig]:
    """compose("quant=kv4", ...) -> the checked configuration, as run.py makes it."""

    def compose(*overrides: str) -> RunConfig:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return parse(OmegaConf.to_object(hydra_compose("config", overrides=list(overrides))))

    return compose


@pytest.fixture(scope="session")
def checkpoint_shape() -> Checkpoint:
    """SmolLM2-135M's shape at a path where nothing is."""
    return Checkpoint(
        path=Path("/no/checkpoint"), source="none", sha256="", architecture="LlamaForCausalLM", layers=30, q_heads=9,
        kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536, vocab_size=49152, dtype_name="float32",
        parameters=1,
    )
