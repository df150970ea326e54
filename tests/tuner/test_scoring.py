"""The tuner's shortcut through a model gives what the whole path gives, with the pool's own quantizer."""

import pytest
import torch

from kvtuner_sglang.quality import recipe
from kvtuner_sglang.quality import transformers_path as path
from kvtuner_sglang.quality.compare import compare_logits
from kvtuner_sglang.tuner.held_out import HeldOutText
from kvtuner_sglang.tuner.menu import Menu
from kvtuner_sglang.tuner.scoring import Scorer, recipes_of
from kvtuner_sglang.tuner.sensitivity import alone, combined

PAGE = 64
MENU = Menu(("2", "4", "4b", "8"), ("2s", "4s", "8s"), 64, PAGE)
NAMES = [f"K{k} V{v}" for k in MENU.key_words for v in MENU.value_words]


@pytest.fixture(scope="module")
def windows(tokens):
    return [tokens[:200], tokens[30:230]]


@pytest.fixture(scope="module")
def scorer(tiny_model, windows):
    return Scorer(tiny_model, windows, PAGE)


def whole_path(model, windows, plan):
    """Mean KL behind the first page of the largest size, from the logits of whole prefills."""
    with path.quantized(recipes_of(plan, PAGE)):
        quantized = [path.logits(model, window) for window in windows]
    rows = [compare_logits(path.logits(model, w), q, w).kl[128:] for w, q in zip(windows, quantized, strict=True)]
    return sum(r.sum() for r in rows) / sum(map(len, rows))


@pytest.mark.parametrize("words", [("K2 V2s",) * 3, ("K8 V8s", "K2 V2s", "K4b V4s"), ("K4 V2s", "K2 V8s", "K4b V2s")])
def test_a_plan_scores_what_the_whole_path_says(scorer, tiny_model, windows, words):
    plan = [MENU.pairs[NAMES.index(word)] for word in words]
    assert scorer.kl(plan) == pytest.approx(whole_path(tiny_model, windows, plan), rel=1e-3)


@pytest.mark.parametrize("page", [64, 128])
def test_held_out_text_counts_the_positions_that_the_search_does(tiny_model, windows, page):
    """On the same windows both say the same, and count as many positions for every page."""
    scorer, plan = Scorer(tiny_model, windows, page), [MENU.pairs[NAMES.index("K2 V2s")]] * 3
    held_out = HeldOutText(tiny_model, windows).score(plan, page)
    assert held_out.kl == pytest.approx(scorer.kl(plan), rel=1e-3)
    assert held_out.n_tokens == scorer.positions == 2 * (200 - 128)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_layer_alone_starts_at_that_layer_and_scores_the_same(scorer, tiny_model, windows, layer):
    plan = alone(MENU.pairs[0], layer, 3)
    expected = whole_path(tiny_model, windows, plan)
    assert expected > 1e-3
    assert scorer.kl(plan) == pytest.approx(expected, rel=1e-3)
    assert scorer.kl([None] * 3) == 0


def test_the_quantizer_is_the_pools(scorer, monkeypatch):
    """With the reference's own functions replaced by exact ones nothing is lost any more."""
    plan = [MENU.pairs[NAMES.index("K4b V2s")]] * 3
    assert scorer.kl(plan) > 1e-2
    monkeypatch.setattr(recipe, "quantize", lambda x, bits, symmetric: (x, None))
    monkeypatch.setattr(recipe, "dequantize", lambda codes, meta, bits: codes)
    monkeypatch.setattr(recipe, "encode", lambda fmt, x, weight: (x,))
    monkeypatch.setattr(recipe, "decode", lambda fmt, x: x)
    assert scorer.kl(plan) == pytest.approx(0, abs=1e-5)


def test_attention_error_of_a_pair_falls_with_its_bits(scorer):
    errors = torch.tensor([scorer.attention_errors(MENU.pairs[NAMES.index(name)]) for name in ("K2 V2s", "K4 V4s",
                                                                                             "K8 V8s")])
    assert (errors[0] > 10 * errors[1]).all()
    assert (errors[1] > 10 * errors[2]).all()


def test_pairs_are_put_together_from_the_best_of_each_side():
    keys, values = {2: 0.5, 4: 0.1, 8: 0.01}, {2: 0.2, 4: 0.05, 8: 0.0}
    asked = []

    def kl_of(fmt):
        asked.append(fmt)
        assert 8 in (fmt.key.bits, fmt.value.bits)
        return keys[fmt.key.bits] + values[fmt.value.bits] - (0.05 if fmt.key.boosted else 0)

    found = dict(zip(NAMES, combined(MENU, kl_of), strict=True))
    assert found["K2 V2s"] == pytest.approx(0.7)
    assert found["K4b V4s"] == pytest.approx(0.1)
    assert found["K8 V8s"] == pytest.approx(0.01)
    assert len(asked) == 1 + len(MENU.keys) + len(MENU.values)
