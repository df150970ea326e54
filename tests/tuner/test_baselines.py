"""What a plan is compared with has no more bits than it, and is what its name says."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant import kv_format
from kvtuner_sglang.quant.plan_file import LayerFormat, ModelIdentity, load_plan
from kvtuner_sglang.tuner import baselines
from kvtuner_sglang.tuner.baselines import FORMATS, first_last
from kvtuner_sglang.tuner.menu import Menu, layer_format, pair_name

CONF = Path(__file__).parents[2] / "conf"
MENU = Menu(("2", "4s", "4", "4b", "8"), ("2s", "4s", "8s"), 64, 128)
LAYERS = 30
SURVIVING = [tuple(range(len(MENU.pairs)))] * 10 + [(0, 6, 9)] * 20


def test_every_format_of_conf_quant_is_compared():
    files = {path.stem for path in (CONF / "quant").glob("*.yaml")} - {"bf16", "fp8", "plan"}
    assert files == FORMATS.keys()
    for name, fmt in FORMATS.items():
        assert command_line.load([f"quant={name}"], CONF).quant.plan(1)[0] == fmt


@pytest.mark.parametrize("fmt", [*MENU.pairs, *FORMATS.values()], ids=pair_name)
def test_a_plan_file_has_words_for_every_format(fmt):
    assert layer_format(fmt).kv_format() == fmt


def test_uniform_plans_have_every_page_and_count_their_metadata():
    found = {one.name: one for one in baselines.uniform_baselines(MENU, LAYERS, 3.3)}
    assert found["kv4"].effective_bits == 4.5
    assert found["kv4 page 128"].effective_bits == 4.375
    assert found["k4v2_token"].page_size == 1
    assert found["K4 V2s page 128"].effective_bits == 3.25
    assert "K4b V2s page 128" not in found  # 3.375 bits
    assert all(len(set(one.plan)) == 1 and len(one.plan) == LAYERS for one in found.values())


@pytest.mark.parametrize("bits", [3.5, 4.0, 5.0])
def test_first_and_last_layers_are_as_many_as_the_bits_allow(bits):
    found = baselines.first_last_baselines(MENU, LAYERS, bits)
    assert len(found) >= 2
    for one in found:
        high = pair_name(one.plan[0])
        count = sum(fmt == one.plan[0] for fmt in one.plan)
        assert one.effective_bits <= bits + 1e-6
        assert one.name.startswith(f"{high} in {count} ")
        if count < LAYERS:
            more = first_last(one.plan[0], one.plan[LAYERS // 2], count + 1, LAYERS)
            assert MENU.bits(more) > bits


def test_first_and_last_are_both_ends():
    high, low = MENU.pairs[-1], MENU.pairs[0]
    assert first_last(high, low, 3, 6) == (high, high, low, low, low, high)
    assert first_last(high, low, 6, 6) == (high,) * 6


@pytest.mark.parametrize("bits", [3.25, 4.0])
def test_random_plans_have_just_the_bits_and_only_surviving_pairs(bits):
    found = baselines.random_baselines(MENU, SURVIVING, bits, 5, seed=0)
    assert len({one.plan for one in found}) == 5
    for one in found:
        assert bits - 0.01 <= one.effective_bits <= bits + 1e-6
        assert all(MENU.pairs.index(fmt) in kept for fmt, kept in zip(one.plan, SURVIVING, strict=True))
    assert found == baselines.random_baselines(MENU, SURVIVING, bits, 5, seed=0)
    assert found != baselines.random_baselines(MENU, SURVIVING, bits, 5, seed=1)


def test_random_plans_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="effective bits"):
        baselines.random_baselines(MENU, [(0,)] * LAYERS, 4.0, 1, seed=0)


def test_a_preset_that_is_broken_is_not_passed_over(monkeypatch):
    broken = replace(load_plan("preset:qwen2_5_7b_kivi_3_18"), layers={"0": LayerFormat(4, 4)}, default=None)
    monkeypatch.setattr(baselines, "load_plan", lambda path: broken)
    with pytest.raises(ConfigError, match="says nothing of layer 1"):
        baselines.published_baselines(MENU, ModelIdentity("Qwen2ForCausalLM", 28, 4, 128))


def test_names_of_pairs_differ_where_their_groups_do():
    """They are keys of the cache of scores."""
    formats = [kv_format(bits_key=4, bits_value=4, axis_key=0, axis_value=0, group_size=size, asym=True, key_boost=None)
               for size in (None, 32, 64)]
    assert len(set(map(pair_name, formats))) == 3


def test_published_plans_are_for_models_of_their_shape_alone():
    qwen = ModelIdentity("Qwen2ForCausalLM", 28, 4, 128)
    menu = Menu(("2", "4"), ("2s", "4s"), 128, 64)
    names = [one.name for one in baselines.published_baselines(menu, qwen)]
    assert len(names) == 4
    assert all(name.startswith("qwen2_5_7b") for name in names)
    assert baselines.published_baselines(MENU, ModelIdentity("LlamaForCausalLM", 30, 3, 64)) == []
