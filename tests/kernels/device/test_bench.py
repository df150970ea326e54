"""What task=kernels checks and times, on small shapes; on a CPU the times are those of a stand-in."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from kvtuner_sglang import command_line
from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.kernel_bench import decode_times, run, store_times
from kvtuner_sglang.kernel_bench.cases import KVTUNER, SHAPES, Cell, Shape, storage
from kvtuner_sglang.kernel_bench.check import check_decode
from kvtuner_sglang.kernel_bench.decode_times import time_cell
from kvtuner_sglang.kernel_bench.metrics import ACCURATE, CEILING, FINITE, IN_TURN, SAME_BYTES
from kvtuner_sglang.kernel_bench.store_times import check_stores, store_case, time_stores, works_of, wrong_bytes
from kvtuner_sglang.kernel_bench.tidy import table_of_run
from kvtuner_sglang.tasks import kernels
from kvtuner_triton import timing
from kvtuner_triton.timing import read_works

CONF = Path(__file__).parents[3] / "conf"
SHAPE = Shape("test", 4, 2, 64)
FORMATS = ("kv4", "kv2", "kv8_token")


def run_once(works, repeats):
    """In place of CUDA graphs: every work once, and a made-up time."""
    for work in works.values():
        work()
    return {name: [100.0 + i for i in range(repeats)] for name in works}


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernels_read_the_caches_that_are_timed(name, device):
    (check,) = check_decode(SHAPE, [name], False, device, 0, [1, 65, 200], multiprocessors=2)
    assert check.kernel == KVTUNER
    assert check.ok, check


def test_a_cell_is_timed_over_all_its_layers(device, monkeypatch):
    monkeypatch.setattr(decode_times, "LEAST_STEPS", 4)
    cell = Cell(SHAPE, 2, 128, ("kv4", "kv4_token"), peers=False)
    size = storage("kv4").decode_bytes(SHAPE, cell.seq_lens)
    times = time_cell(cell, 3, 2.5 * size, run_once, device, 0, multiprocessors=2)
    assert [(t.format, t.layers, t.page, t.steps) for t in times] == [("kv4", 3, 64, 4),
                                                                      ("kv4_token", 6, 1, 6)]
    assert times[0].us == times[0].plan_us == (25.0, 25.25, 25.5)


@pytest.mark.parametrize("name", ["kv4", "k4v2", "kv4_token"])
def test_stores_are_bit_exact(name, device):
    checks = list(check_stores(SHAPE, [name], device, 0, tokens=128, batch=3))
    assert [check.work for check in checks] == list(works_of(storage(name)))
    assert [check.wrong for check in checks] == [()] * len(checks)


def test_a_wrong_store_is_seen(device, monkeypatch):
    case = store_case(SHAPE, storage("kv4"), "extend", 128, 1, device, 0)
    monkeypatch.setattr(type(case), "run", lambda self, layer: None)  # it stores nothing
    assert wrong_bytes(case) == ("key codes", "key meta", "key extra", "value codes", "value meta", "tails")


def test_stores_are_timed_in_turn_over_layers(device, monkeypatch):
    monkeypatch.setattr(store_times, "STEP_BATCH", 3)
    times = list(time_stores(SHAPE, ["kv4_token"], 3, 0, run_once, device, 0, extend_tokens=128))
    assert [(t.work, t.tokens, t.layers) for t in times] == [("extend", 128, 2), ("step", 3, 2)]


def test_every_layer_of_a_store_has_a_page_in_progress_of_its_own(device):
    case = store_case(SHAPE, storage("kv4"), "step", 3, 2, device, 0)
    before = case.tails.clone()
    case.run(1)
    assert torch.equal(case.tails[0], before[0])
    assert not torch.equal(case.tails[1], before[1])


def test_plain_reading_reads_everything_in_every_way(device, monkeypatch):
    monkeypatch.setattr(timing, "READS", ((4, 512, 4), (8, 256, 8)))
    source = torch.randint(-2**31, 2**31 - 1, (2**14,), dtype=torch.int32, device=device)
    for name, work in read_works(source, sums := torch.zeros(8, dtype=torch.int32, device=device)).items():
        sums.zero_()
        work()
        assert sums.sum(dtype=torch.int32) == source.sum(dtype=torch.int32), name


def test_a_whole_run_ends_with_its_record(device, monkeypatch, tmp_path):
    """Small shapes, no peers and made-up times; everything else is the task as it runs."""
    tiny = replace(SHAPES["qwen2_5_7b"], q_heads=4, kv_heads=2, head_dim=64)
    monkeypatch.setitem(SHAPES, "qwen2_5_7b", tiny)
    monkeypatch.setattr(run, "DEVICE", device)
    monkeypatch.setattr(store_times, "STEP_BATCH", 2)
    for module in (store_times, decode_times):
        monkeypatch.setattr(module, "LEAST_STEPS", 2)
    monkeypatch.setattr(run, "require_device", lambda config: None)
    monkeypatch.setattr(kernels, "require_device", lambda config: None)
    monkeypatch.setattr(run.compile_kernels, "build_all", lambda config: iter(run.compile_kernels.jobs(config)))
    monkeypatch.setattr(run, "ceilings", lambda: (2900.0, 3000.0))
    monkeypatch.setattr(run, "graph_samples", run_once)
    monkeypatch.setattr(run, "rotated_bytes", lambda: 1.0)
    monkeypatch.setattr(run, "check_stores", partial(check_stores, tokens=128, batch=3))
    monkeypatch.setattr(run, "time_stores", partial(time_stores, extend_tokens=128))
    monkeypatch.setattr(run, "check_decode", partial(check_decode, lengths=[1, 130], multiprocessors=2))
    monkeypatch.setattr(run, "time_cell", partial(time_cell, multiprocessors=2))
    words = ["task=kernels", f"runs_dir={tmp_path}", "tracking=disabled", "kernels=small", "kernels.formats=[kv4]",
             "kernels.shapes=[qwen2_5_7b]", "kernels.contexts=[128]", "kernels.batches=[1,2]",
             "kernels.peers=false", "kernels.memory_gib=0.00007"]
    said: list[str] = []
    outcome = kernels.run(command_line.load(words, CONF), words, said.append)
    assert outcome.status == "ok", outcome.reason
    record = load_record(outcome.run_dir)
    assert record.metrics["decode_us/qwen2_5_7b/kvtuner/kv4/batch=1/context=128"].unit == "us"
    assert record.warnings == ("left out: 4/2/64 2 x 128: its caches take 8.01e-05 GiB, more than 7e-05 "
                               "(kernels.memory_gib)",)
    assert record.commands[0].argv == ("python", "run.py", *words)
    assert len(table_of_run(outcome.run_dir, record.model_copy(update={"environment": named_gpu(record)}))) == 1
    assert any("stores bit-exact" in line for line in said)
    assert "3 of 3 stores bit-exact" in [verdict.what for verdict in record.verdicts if verdict.held]
    assert record.rules == (ACCURATE, SAME_BYTES, IN_TURN, FINITE, CEILING), "no peer was there to be held to anything"


def named_gpu(record):
    unknown = {k: v for k, v in record.environment.unknown.items() if k != "gpus"}
    return record.environment.model_copy(update={"gpus": ("Test GPU",), "unknown": unknown})
