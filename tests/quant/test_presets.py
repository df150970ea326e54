"""KVTuner's published plans load against the models they are for, with the mean bits that the paper states."""

import subprocess
import sys

import pytest

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant import KVShape, ModelIdentity, load_plan, mean_bits, page_tokens
from kvtuner_sglang.quant.plan_file import preset_names

QWEN = ModelIdentity("Qwen2ForCausalLM", layers=28, kv_heads=4, head_dim=128)
LLAMA = ModelIdentity("LlamaForCausalLM", layers=32, kv_heads=8, head_dim=128)
# name: model, mean bits of the paper, bits per element of metadata.  Per token: a scale and a zero of 16 bits for 128
# channels; KIVI's keys: for 64 tokens, so keys have twice that.
PUBLISHED = {
    "qwen2_5_7b_per_token_4_00": (QWEN, 4.00, 32 / 128),
    "qwen2_5_7b_per_token_3_93": (QWEN, 3.93, 32 / 128),
    "qwen2_5_7b_kivi_3_93": (QWEN, 3.93, (32 / 64 + 32 / 128) / 2),
    "qwen2_5_7b_kivi_3_18": (QWEN, 3.18, (32 / 64 + 32 / 128) / 2),
    "llama_3_1_8b_kivi_3_25": (LLAMA, 3.25, (32 / 64 + 32 / 128) / 2),
    "llama_3_1_8b_per_token_3_59": (LLAMA, 3.59, 32 / 128),
}


def test_every_preset_is_checked_here():
    assert preset_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_mean_bits_are_the_papers_and_metadata_comes_on_top(name):
    model, bits, metadata = PUBLISHED[name]
    plan = load_plan(f"preset:{name}").formats(model, model.layers)
    assert round(mean_bits(plan), 2) == bits
    shape = KVShape(model.kv_heads, model.head_dim, 2, page_tokens(plan, None))
    assert shape.effective_bits(plan) == pytest.approx(mean_bits(plan) + metadata)
    assert {fmt.key.axis for fmt in plan} == {1 if "kivi" in name else 0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_for_its_own_model(name):
    model, *_ = PUBLISHED[name]
    other = LLAMA if model is QWEN else QWEN
    with pytest.raises(ConfigError, match=model.architecture):
        load_plan(f"preset:{name}").formats(other, other.layers)


def test_the_plan_of_four_bits_layer_by_layer():
    """The published list once more, written out."""
    plan = load_plan("preset:qwen2_5_7b_per_token_4_00").formats(QWEN, 28)
    found = " ".join(f"{fmt.key.bits}{fmt.value.bits}" for fmt in plan)
    assert found == "88 42 42 82 42 42 44 44 42 44 44 44 44 82 44 44 44 44 44 44 44 44 44 44 42 42 44 82"


def test_an_unknown_preset_names_those_that_exist():
    with pytest.raises(ConfigError, match="choose preset:NAME from llama_3_1_8b_kivi_3_25"):
        load_plan("preset:kv4")


def test_the_list_says_both_counts_of_bits():
    done = subprocess.run([sys.executable, "-m", "kvtuner_sglang.quant.presets"], capture_output=True, text=True,
                          timeout=60, check=True)
    assert "preset:qwen2_5_7b_kivi_3_18: Qwen2.5-7B, 3.18 bits, 3.554 with metadata" in done.stdout
    assert done.stdout.count("with metadata") == len(PUBLISHED)
