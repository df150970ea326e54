"""Tasks as run.py runs them, from starting the nodes to the report, with lying_server.py in the place of SGLang.

A made-up roofline stands in that of this machine, and the client may idle more than in a measurement, so that no
verdict depends on the machine or on what else it does.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.evidence import environment
from kvtuner_sglang.evidence.record import RunRecord, load_record, write_record
from kvtuner_sglang.measure import physics, validity
from kvtuner_sglang.measure.roofline import Roofline
from kvtuner_sglang.serving import cluster
from kvtuner_sglang.serving.checkpoint import Checkpoint
from kvtuner_sglang.serving.commands import NodeCommand
from served_info import truth

CONF = Path(__file__).parents[1] / "conf"
SERVER = Path(__file__).with_name("lying_server.py")
OVERRIDES = ["server.device=cpu", "tracking=disabled", "quality.probe=false", "server.request_timeout_s=10"]
SEED_TESTS = ["workload.ttft.prompt_tokens=[10,1000]", "workload.ttft.repeats=1", "workload.throughput.requests=3",
              "workload.throughput.rounds=2", "workload.throughput.concurrency=[1,2]"]
CHECKPOINT = Checkpoint(
    path=Path("/no/checkpoint"), source="none", sha256="0" * 64, architecture="LlamaForCausalLM", layers=30, q_heads=9,
    kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536, vocab_size=49152, dtype_name="float32",
    parameters=162_826_560,
)
# All threads together need 60 ms for a thousand tokens of this model and 15 ms for one; an honest answer takes longer.
MADE_UP = Roofline("cpu", "float32", 2**29, flops_per_s=1.92e12, bytes_per_s=1.8e10)


def run_task(task: ModuleType, tmp_path: Path, patch: pytest.MonkeyPatch, *more: str,
             servers: Sequence[str] = ("honest",), workload: Sequence[str] = tuple(SEED_TESTS),
             info: Callable[[dict[str, Any]], None] | None = None) -> tuple[Path, RunRecord]:
    """`task` with one of lying_server's `servers` a node; `info` changes what /server_info says.

    Returns the folder it left and the record in it.
    """
    words = [*OVERRIDES, *workload, *more]
    config = command_line.load([*words, f"runs_dir={tmp_path / 'runs'}"], CONF)
    said = truth(config, model_path=str(CHECKPOINT.path))
    if info:
        info(said)
    path = tmp_path / "info.json"
    path.write_text(json.dumps(said))

    def commands(_config: RunConfig, _checkpoint: Checkpoint, ports: Any, *_more: Any) -> tuple[NodeCommand, ...]:
        return tuple(
            NodeCommand(node, (sys.executable, str(SERVER), "127.0.0.1", str(port), server, str(path)), {},
                        "127.0.0.1", port)
            for node, (port, server) in enumerate(zip(ports.http, servers, strict=True)))

    patch.setattr(cluster, "node_commands", commands)
    patch.setattr(cluster, "BLAME_WAIT_S", 0.0)
    patch.setattr(environment, "BUSY_SAMPLE_S", 0.01)
    patch.setattr(validity, "MAX_DISPATCH_SHARE", 0.3)
    patch.setattr(task, "prepare_checkpoint", lambda *_words: CHECKPOINT)
    patch.setattr(physics, "roofline", lambda *_words: MADE_UP)
    patch.setattr(physics, "cpu_server_environment", lambda *_words, **_more: {"OMP_NUM_THREADS": "1"})
    task.run(config, words, lambda _line: None)
    return config.run_dir, load_record(config.run_dir)


def committed(run_dir: Path) -> Path:
    """As if the checkout had been clean: nothing but the run's own worth is then in the way of publishing it."""
    record = load_record(run_dir)
    clean = record.environment.model_copy(update={"git_sha": "a" * 40, "git_dirty": False, "unknown": {
        name: why for name, why in record.environment.unknown.items() if not name.startswith("git_")}})
    write_record(run_dir, record.model_copy(update={"environment": clean}))
    return run_dir
