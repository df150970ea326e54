"""Cells and byte formulas."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.kernel_bench.cases import (
    BF16,
    FORMATS,
    FP8,
    SHAPES,
    Cell,
    cells,
    storage,
    too_large,
)
from kvtuner_sglang.kernel_bench.compile import jobs
from kvtuner_sglang.kernel_bench.config import FormatName, ShapeName
from kvtuner_sglang.quant import KVShape

CONF = Path(__file__).parents[2] / "conf"
SHAPE = SHAPES["qwen2_5_7b"]


def kernels(*words: str):
    return command_line.load(["task=kernels", *words], CONF).kernels


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_formats_are_those_of_conf(name):
    assert FORMATS[name] == command_line.load([f"quant={name}"], CONF).quant.plan(1)[0]


def test_names_that_may_be_configured_are_those_there_are():
    assert set(get_args(ShapeName)) == set(SHAPES)
    assert set(get_args(FormatName)) == set(FORMATS)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_bytes_are_stored_pages_tails_queries_and_outputs(name, shape):
    store = storage(name)
    layout = KVShape(shape.kv_heads, shape.head_dim, 2, store.page)
    a_token = sum(layout.tensor_bytes_per_token(x) for x in (store.fmt.key, store.fmt.value))
    plain, queries = shape.kv_heads * shape.head_dim * 4, 2 * shape.q_heads * shape.head_dim * 2
    if store.fmt.key.per_channel:  # 640 = 9 complete pages before the last token's, and that page of 64
        assert store.decode_bytes(shape, [640, 130]) == round((576 + 128) * a_token) + (64 + 2) * plain + 2 * queries
    else:
        assert store.decode_bytes(shape, [640, 130]) == round(770 * a_token) + 2 * queries


def test_bytes_of_peers_are_their_elements():
    cache, rest = 16 * 32768 * 4 * 128 * 2, 2 * 16 * 28 * 128 * 2
    assert BF16.decode_bytes(SHAPE, [32768] * 16) == 2 * cache + rest
    assert FP8.decode_bytes(SHAPE, [32768] * 16) == cache + rest


def test_caches_in_rotation_are_more_than_the_l2_cache():
    for context in (1024, 32768):
        for store in (BF16, storage("kv2")):
            layers = store.layers(SHAPE, [context], 150e6)
            assert layers * store.decode_bytes(SHAPE, [context]) >= 150e6
    assert BF16.layers(SHAPE, [2048] * 32, 150e6) == 2
    assert BF16.layers(SHAPE, [32768] * 64, 150e6) == 1
    assert storage("kv2").layers(SHAPES["qwen2_5_0_5b"], [128], 150e6) == 1024


def test_published_cells():
    found = list(cells(kernels()))
    assert len(found) == 3 * (4 * 3 + 1)
    assert Cell(SHAPE, 16, 32768, kernels().formats, True) in found
    assert Cell(SHAPE, 1, 131072, ("kv4",), True) in found
    assert [too_large(cell, 60, 150e6) for cell in found] == [None] * len(found)


def test_a_cell_that_does_not_fit_says_why():
    cell = Cell(SHAPES["llama3_1_8b"], 64, 131072, ("kv4",), True)
    assert too_large(cell, 40, 150e6).startswith("32/8/128 64 x 131072: its caches take ")
    assert "kernels.memory_gib" in too_large(cell, 40, 150e6)


def test_everything_is_built_before_it_is_timed():
    built = jobs(kernels())
    assert {(job.shape, job.format) for job in built} == {(s, f) for s in kernels().shapes
                                                          for f in (*kernels().formats, None)}
    assert all(job.format for job in jobs(kernels("kernels.peers=false")))


def test_the_other_tasks_directories_do_not_depend_on_the_kernels_group():
    serve, kv8, small, more, published = (command_line.load(words, CONF) for words in (
        [], ["quant=kv8"], ["task=kernels", "kernels=small"], ["task=kernels", "kernels.repeats=9"], ["task=kernels"]))
    assert replace(serve, kernels=small.kernels).config_hash == serve.config_hash
    assert replace(published, quant=kv8.quant).run_dir == published.run_dir
    assert more.run_dir != published.run_dir
