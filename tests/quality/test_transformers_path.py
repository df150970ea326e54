"""Exact where it must be exact, and visibility by position alone."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quality import transformers_path as path
from kvtuner_sglang.quality.recipe import PER_CHANNEL, KVRecipe, TensorRecipe

LAYERS = 3
FULL = TensorRecipe(16)
KV4 = KVRecipe(TensorRecipe(4, PER_CHANNEL, 64), TensorRecipe(4))
KV4_BOOSTED = KVRecipe(TensorRecipe(4, PER_CHANNEL, 64, boost=True), TensorRecipe(4, symmetric=True))
KV4_TOKEN = KVRecipe(TensorRecipe(4), TensorRecipe(4))
FLOAT_NOISE = 2e-4  # on logits of size 1 to 10, after three layers in fp32


def run(model, tokens, recipe, statistics=()):
    with path.quantized([recipe] * LAYERS, statistics):
        return path.logits(model, tokens)


def test_full_precision_equals_transformers_own_attention(tiny_checkpoint, tiny_model, tokens):
    eager = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        theirs = eager(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    assert theirs.abs().max() > 1
    assert torch.allclose(path.logits(tiny_model, tokens), theirs, atol=FLOAT_NOISE)


@pytest.mark.parametrize("recipe", [
    KVRecipe(TensorRecipe(16), TensorRecipe(16), key_mean=True),
    KVRecipe(TensorRecipe(16), TensorRecipe(16), key_scale="range"),
    KVRecipe(TensorRecipe(16), TensorRecipe(16), key_mean=True, key_scale="sqrt"),
])
def test_conditioning_alone_changes_nothing(tiny_model, tokens, recipe):
    statistics = path.key_statistics(tiny_model, tokens[:100])
    assert torch.allclose(run(tiny_model, tokens, recipe, statistics), path.logits(tiny_model, tokens),
                          atol=FLOAT_NOISE)


def test_conditioning_without_calibration_is_refused(tiny_model, tokens):
    with pytest.raises(ConfigError, match="calibration"):
        run(tiny_model, tokens, KVRecipe(TensorRecipe(4), FULL, key_mean=True))


def test_quantization_changes_something_and_fewer_bits_change_more(tiny_model, tokens):
    exact = path.logits(tiny_model, tokens)
    errors = [(run(tiny_model, tokens, KVRecipe(TensorRecipe(b, PER_CHANNEL, 64), TensorRecipe(b))) - exact)
              .square().mean().item() for b in (8, 4, 2)]
    assert FLOAT_NOISE**2 < errors[0] < errors[1] / 20 < errors[2] / 100


def test_first_page_is_full_precision_per_channel_and_not_per_token(tiny_model, tokens):
    exact = path.logits(tiny_model, tokens)
    paged, per_token = (run(tiny_model, tokens, recipe) for recipe in (KV4, KV4_TOKEN))
    assert torch.allclose(paged[:64], exact[:64], atol=FLOAT_NOISE)
    assert (paged[64:] - exact[64:]).abs().amax(-1).min() > FLOAT_NOISE
    assert (per_token - exact).abs().amax(-1).min() > FLOAT_NOISE  # its own token, too, is read as stored


@pytest.mark.parametrize("recipe", [KV4, KV4_BOOSTED, KV4_TOKEN])
def test_a_row_depends_on_position_alone(tiny_model, tokens, recipe):
    """What follows a token, and so where a chunk ends, changes nothing for it.

    In float64, so that the noise of other matrix shapes moves no code across a rounding border.
    """
    model = copy.deepcopy(tiny_model).double()
    whole = run(model, tokens, recipe)
    for length in (63, 64, 65, 128, 190):
        assert torch.allclose(run(model, tokens[:length], recipe), whole[:length], atol=FLOAT_NOISE)


def test_a_token_of_an_earlier_page_is_never_seen_in_full(tiny_model, tokens):
    """With the keys and values of stored pages zeroed, nothing but position can reach a later page."""
    other = [t ^ 1 for t in tokens[:64]] + tokens[64:]
    erase = KVRecipe(TensorRecipe(2, PER_CHANNEL, 64), FULL)
    original = path.fake_quantize
    path.fake_quantize = lambda _recipe, x, _weight=None: torch.zeros_like(x)
    try:
        a, b = (run(tiny_model, t, erase) for t in (tokens, other))
    finally:
        path.fake_quantize = original
    assert torch.allclose(a[64:], b[64:], atol=FLOAT_NOISE)
    assert not torch.allclose(a[:64], b[:64], atol=0.1)


def test_one_layer_alone(tiny_model, tokens):
    exact = path.logits(tiny_model, tokens)
    with path.quantized([None, KV4_TOKEN, None]):
        one = path.logits(tiny_model, tokens)
    all_layers = run(tiny_model, tokens, KV4_TOKEN)
    assert 0 < (one - exact).square().mean() < (all_layers - exact).square().mean()


def test_attention_errors_name_the_layer_that_is_quantized(tiny_model, tokens):
    errors = path.attention_errors(tiny_model, tokens, [None, None, KV4_TOKEN])
    assert errors[0] == errors[1] == 0
    assert errors[2] > 1e-4
    after = path.logits(tiny_model, tokens)
    assert torch.equal(after, path.logits(tiny_model, tokens))


def test_teacher_forced_answers_are_those_of_greedy_decoding(tiny_model, tokens):
    prompts = [tokens[:70], tokens[40:190], tokens[3:99]]
    decoded = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(4):
            text.append(int(run(tiny_model, text, KV4)[-1].argmax()))
        decoded.append(text[len(prompt):])
    with path.quantized([KV4] * LAYERS):
        assert path.answers_greedily(tiny_model, prompts, decoded, batch=2) == [True] * 3
        wrong = [[*answer[:3], (answer[3] + 1) % 256] for answer in decoded]
        assert path.answers_greedily(tiny_model, prompts, wrong, batch=3) == [False] * 3
