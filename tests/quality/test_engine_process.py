"""The engine's process: what it says is passed on, what breaks has a sentence, nothing is left running."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvtuner_sglang.errors import MeasurementInvalid, RunFailed
from kvtuner_sglang.quality import engine_process, measure
from kvtuner_sglang.quality.engine_spec import EngineResult, EngineSpec, Questions

pytestmark = pytest.mark.alone
SPEC = EngineSpec(
    model_path="/model", device="cpu", dtype="float32", plugin={"kvtuner_kv_gib": 1.0}, page_size=None,
    context_length=256, max_running_requests=2, chunked_prefill_tokens=64, seed=0, windows=[[1, 2, 3]],
    questions={"recall": Questions([[4, 5]], [[6]])}, out_dir="", reference_dir=None, port=20000,
)


def run(monkeypatch, tmp_path, script, timeout_s=30.0):
    """run_engine with a stand-in script for engine_run: arguments are SPEC.json RESULT.json."""
    monkeypatch.setattr(engine_process, "engine_command",
                        lambda spec, result: [sys.executable, "-c", script, str(spec), str(result)])
    said: list[str] = []
    spec = replace(SPEC, out_dir=str(tmp_path))
    result = engine_process.run_engine(spec, timeout_s, tmp_path / "engine.log", said.append)
    return result, said


def test_the_spec_travels_whole(tmp_path):
    SPEC.write(tmp_path / "spec.json")
    assert EngineSpec.read(tmp_path / "spec.json") == SPEC


def test_progress_and_result_come_back(monkeypatch, tmp_path):
    script = """
import sys
from pathlib import Path
from kvtuner_sglang.quality.engine_spec import EngineResult, EngineSpec
spec = EngineSpec.read(Path(sys.argv[1]))
print("half way", flush=True)
EngineResult({"enabled": False}, {"recall": ["x"]}, [], {"start": 1.0}).write(Path(sys.argv[2]))
"""
    result, said = run(monkeypatch, tmp_path, script)
    assert result == EngineResult({"enabled": False}, {"recall": ["x"]}, [], {"start": 1.0})
    assert said == ["half way"]


def test_a_refusal_keeps_its_sentence(monkeypatch, tmp_path):
    with pytest.raises(MeasurementInvalid, match=r"^rows are missing\.$"):
        run(monkeypatch, tmp_path, "print('refused: rows are missing.'); raise SystemExit(2)")


def test_a_crash_names_the_log(monkeypatch, tmp_path):
    with pytest.raises(RunFailed, match=r"exit status 3.*engine\.log"):
        run(monkeypatch, tmp_path, "import sys; sys.stderr.write('why\\n'); sys.exit(3)")
    assert (tmp_path / "engine.log").read_text() == "why\n"


def test_an_old_result_is_not_taken_for_a_new_one(monkeypatch, tmp_path):
    EngineResult({}, {}, []).write(tmp_path / "result.json")
    with pytest.raises(RunFailed):
        run(monkeypatch, tmp_path, "pass")


def test_time_is_bounded_and_children_go_too(monkeypatch, tmp_path):
    script = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / 'child')!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    with pytest.raises(RunFailed, match="bound 2 s"):
        run(monkeypatch, tmp_path, script, timeout_s=2.0)
    pid = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not _alive(pid):
            return
        time.sleep(0.1)
    pytest.fail("the child is still running")


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_full_precision_is_measured_once_for_what_it_depends_on(monkeypatch, tmp_path):
    ran = []

    def engine(spec, timeout_s, log_path, say):
        ran.append(spec)
        result = EngineResult({}, {"recall": ["1"]}, [])
        result.write(Path(spec.out_dir) / "result.json")
        return result

    monkeypatch.setattr(measure, "run_engine", engine)
    (tmp_path / "cache").mkdir()

    def ask(spec, sha="a"):
        return measure.full_precision(spec, sha, tmp_path / "cache", 1.0, tmp_path / "log", lambda line: None)[0]

    first = ask(SPEC)
    assert ask(replace(SPEC, model_path="/elsewhere", out_dir="/x", port=1)) == first
    assert len(ran) == 1
    others = [ask(SPEC, sha="b"), ask(replace(SPEC, windows=[[1, 2]])), ask(replace(SPEC, dtype="bfloat16")),
              ask(replace(SPEC, device="cuda")), ask(replace(SPEC, seed=1))]
    assert len({first, *others}) == 6
    assert len(ran) == 6
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]
