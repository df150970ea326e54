"""task=agreement as a user calls it: SmolLM2 behind kv4 on one rank, with noise, and on four ranks in two nodes."""

import subprocess
import sys
from pathlib import Path

import pytest

from kvtuner_sglang.agreement.figures import rows
from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.evidence.samples import read_samples

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # six server processes, four minutes on two cores


def test_four_ranks_are_compared_with_one(tmp_path):
    words = ["task=agreement", "quant=kv4", "agreement.dists=[tp2pp2]", "agreement.prompts=6", "server.device=cpu",
             "tracking=disabled", f"runs_dir={tmp_path}"]
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), *words], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/record.json")
    record = load_record(path.parent)
    assert record.status == "ok"
    assert record.model.dtype == "float32"
    answers = read_samples(path.parent)
    assert [(a["server"], a["request"]) for a in answers] == [
        (server, number) for server in ("single", "single_with_noise", "tp2pp2") for number in range(6)]
    assert {len(a["output_ids"]) for a in answers} == {len(a["log_probabilities"]) for a in answers} == {24}
    (found,) = rows(record.metrics)
    assert found["dist"] == "tp2pp2"
    assert found["floor_mean"] > 1e-4, "without quantized pages in view this test says nothing"
    assert found["tokens"] > 6 * 24 / 4
    assert found["within"] == (found["mean"] <= 2 * found["floor_mean"] and found["max"] <= 2 * found["floor_max"])
    assert len(record.commands) == 4
    noise = ["--kvtuner-kv-noise" in command.argv for command in record.commands]
    assert noise == [False, True, False, False]
    assert ["--nnodes" in command.argv for command in record.commands] == [False, False, True, True]
