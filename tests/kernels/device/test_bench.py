"""What task=kernels checks and times, on small shapes; on a CPU the times are those of a stand-in."""

import pytest

from kvtuner_sglang.kernel_bench.cases import KVTUNER, LEAST_STEPS, Cell, Shape, storage
from kvtuner_sglang.kernel_bench.check import check_decode
from kvtuner_sglang.kernel_bench.decode_times import time_cell
from kvtuner_sglang.kernel_bench.store_times import check_stores, store_case, time_stores, works_of, wrong_bytes

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


def test_a_cell_is_timed_over_all_its_layers(device):
    cell = Cell(SHAPE, 2, 128, ("kv4", "kv4_token"), peers=False)
    size = storage("kv4").decode_bytes(SHAPE, cell.seq_lens)
    times = time_cell(cell, 3, 2.5 * size, run_once, device, 0, multiprocessors=2)
    assert [(t.format, t.layers, t.page, t.steps) for t in times] == [("kv4", 3, 64, LEAST_STEPS),
                                                                      ("kv4_token", 6, 1, LEAST_STEPS)]
    assert times[0].us == (5.0, 5.05, 5.1)
    assert times[0].plan_us == (5.0, 5.05, 5.1)


@pytest.mark.parametrize("name", ["kv4", "k4v2", "kv4_token"])
def test_stores_are_bit_exact(name, device):
    checks = list(check_stores(SHAPE, [name], device, 0, tokens=128, batch=3))
    assert [check.work for check in checks] == list(works_of(storage(name)))
    assert [check.wrong for check in checks] == [()] * len(checks)


def test_a_wrong_store_is_seen(device, monkeypatch):
    case = store_case(SHAPE, storage("kv4"), "extend", 128, 1, device, 0)
    monkeypatch.setattr(type(case), "run", lambda self, layer: None)  # it stores nothing
    assert wrong_bytes(case) == ("key codes", "key meta", "key extra", "value codes", "value meta")


def test_stores_are_timed_in_turn_over_layers(device):
    times = list(time_stores(SHAPE, ["kv4_token"], 3, 0, run_once, device, 0, extend_tokens=128))
    assert [(t.work, t.tokens, t.layers) for t in times] == [("extend", 128, 2), ("step", 64, 2)]
