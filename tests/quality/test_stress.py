"""The stress copy computes the same bits and breaks what mixes channels."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.quality import transformers_path as path
from kvtuner_sglang.quality.recipe import PER_CHANNEL, KVRecipe, TensorRecipe
from kvtuner_sglang.quality.stress import FACTORS, write_stress_copy

LAYERS = 3


@pytest.fixture(scope="module")
def stress_checkpoint(tiny_checkpoint, tmp_path_factory):
    return write_stress_copy(tiny_checkpoint, tmp_path_factory.mktemp("stress") / "copy")


@pytest.fixture(scope="module")
def stress_model(stress_checkpoint):
    return path.load_model(stress_checkpoint, torch.float32, "cpu")


def test_full_precision_is_the_same_function(tiny_model, stress_model, tokens):
    assert torch.equal(path.logits(stress_model, tokens), path.logits(tiny_model, tokens))


def test_keys_have_the_outliers(tiny_model, stress_model, tokens):
    plain, stressed = (path.key_statistics(model, tokens) for model in (tiny_model, stress_model))
    for a, b in zip(plain, stressed, strict=True):
        ratio = ((b.high - b.low) / (a.high - a.low))[:, 0]
        assert sorted(ratio.round().unique().tolist()) == [1.0, *FACTORS]
        assert (ratio.round() > 1).sum(-1).tolist() == [2 * len(FACTORS)] * 2


def test_per_token_keys_suffer_and_keys_per_channel_do_not(tiny_model, stress_model, tokens):
    def error(model, recipe):
        exact = path.logits(model, tokens)
        with path.quantized([recipe] * LAYERS):
            return (path.logits(model, tokens) - exact).square().mean().item()

    per_token = KVRecipe(TensorRecipe(4), TensorRecipe(16))
    per_channel = KVRecipe(TensorRecipe(4, PER_CHANNEL, 64), TensorRecipe(16))
    assert error(stress_model, per_token) > 4 * error(tiny_model, per_token)
    assert error(stress_model, per_channel) < 1.05 * error(tiny_model, per_channel)


def test_biases_are_scaled_too(tiny_checkpoint, tmp_path):
    from safetensors.torch import save_file

    biased = tmp_path / "biased"
    shutil.copytree(tiny_checkpoint, biased)
    state = load_file(biased / "model.safetensors")
    for layer in range(LAYERS):
        for name, rows in (("q_proj", 256), ("k_proj", 128)):
            state[f"model.layers.{layer}.self_attn.{name}.bias"] = torch.ones(rows)
    save_file(state, biased / "model.safetensors", metadata={"format": "pt"})
    copy = load_file(write_stress_copy(biased, tmp_path / "copy") / "model.safetensors")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn"
        k, q = (copy[f"{name}.{p}_proj.bias"].view(heads, 64) for p, heads in (("k", 2), ("q", 4)))
        assert torch.equal(k.repeat_interleave(2, 0) * q, torch.ones(4, 64))
        assert sorted(k.unique().tolist()) == [1.0, *FACTORS]


def test_what_cannot_be_copied_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        write_stress_copy(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
