"""Per-layer plans: written and read back, and one sentence for each way in which they can be wrong."""

import pytest

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quant import LayerFormat, ModelIdentity, Provenance, describe_plan, load_plan, write_plan
from kvtuner_sglang.quant.layer_numbers import layer_numbers, layer_text
from kvtuner_sglang.quant.plan_file import plan_file

MODEL = ModelIdentity("LlamaForCausalLM", layers=5, kv_heads=3, head_dim=64, sha256="ab")
IDENTITY = "model: {architecture: LlamaForCausalLM, layers: 5, kv_heads: 3, head_dim: 64}\n"
FOUR = "{nbits_key: 4, nbits_value: 4}"


@pytest.fixture
def load(tmp_path):
    def load(text: str):
        (tmp_path / "plan.yaml").write_text(text)
        return load_plan(tmp_path / "plan.yaml")

    return load


def test_a_written_plan_is_read_back_as_it_was(tmp_path):
    choices = [LayerFormat(8, 4, axis_key=0, group_size=32), *[LayerFormat(4, 4)] * 2, LayerFormat(16, 2, asym=False),
               LayerFormat(4, 4)]
    provenance = Provenance("a tuner", commit="1234567", calibration="prose", date="2026-01-02", score={"kl": 0.25})
    plan = plan_file(choices, MODEL, provenance)
    assert list(plan.layers) == ["0", "1-2,4", "3"]
    write_plan(tmp_path / "plan.yaml", plan)
    assert load_plan(tmp_path / "plan.yaml") == plan
    assert plan.formats(MODEL, 5) == tuple(choice.kv_format() for choice in choices)


def test_layers_that_are_not_listed_have_the_default(load):
    plan = load(f"{IDENTITY}default: {FOUR}\nlayers: {{'0,2-3': {{nbits_key: 8, nbits_value: 2}}}}")
    assert [(f.key.bits, f.value.bits) for f in plan.formats(MODEL, 5)] == [(8, 2), (4, 4), (8, 2), (8, 2), (4, 4)]


def test_a_plan_in_words_says_which_layers(load):
    plan = load(f"{IDENTITY}default: {FOUR}\nlayers: {{1: {{nbits_key: 8, nbits_value: 2, axis_key: 0}}}}")
    words = describe_plan(plan.formats(None, 5)).split(" | ")
    assert words[0].startswith("layers 0,2-4: K 4 bit per channel")
    assert words[1].startswith("layers 1: K 8 bit per token")
    assert describe_plan(plan.formats(None, 5)[2:]) == words[0].removeprefix("layers 0,2-4: ")


@pytest.mark.parametrize(("text", "numbers"), [("0", [0]), ("3-5", [3, 4, 5]), ("0, 3-4,9", [0, 3, 4, 9])])
def test_layer_numbers(text, numbers):
    assert layer_numbers(text) == numbers
    assert layer_text(numbers) == text.replace(" ", "")


@pytest.mark.parametrize("text", ["", "a", "-1", "3-", "1,,2", "5-3", "0-99999999", "1.5"])
def test_what_are_no_layer_numbers(text):
    with pytest.raises(ConfigError, match=r"write .*\.$"):
        layer_numbers(text)


@pytest.mark.parametrize(("text", "match"), [
    (f"{IDENTITY}layers: {{0-3: {FOUR}}}", "says nothing of layer 4: list it"),
    (f"{IDENTITY}layers: {{0-5: {FOUR}}}", "names layer 5 but the model has layers 0 to 4"),
    (f"{IDENTITY}layers: {{0-4: {FOUR}, 3: {FOUR}}}", "gives layer 3 two formats"),
    (f"{IDENTITY}layers: {{0-4: {FOUR}, 0-4: {FOUR}}}", "'0-4' is given twice"),
    (f"{IDENTITY}layers: {{0-4: {{nbits_key: 5, nbits_value: 4}}}}", "nbits_key=5 cannot be used: input should be 16"),
    (f"{IDENTITY}layers: {{0-4: {{nbits_key: 4}}}}", "nbits_value cannot be used: it is missing"),
    (f"{IDENTITY}layers: {{0-4: {{nbits_key: 4, nbits_value: 4, bits: 4}}}}", "no such key exists"),
    (f"{IDENTITY}layers: {{0-4: {{nbits_key: 8, nbits_value: 4, key_boost: true}}}}", "layer 0 of the plan: only asym"),
    (f"{IDENTITY}layers: {{0-4: {{nbits_key: 8, nbits_value: 4, group_size: 48}}}}", "48 .* does not divide head_dim"),
    (f"{IDENTITY}layers: {{0-4: {{nbits_key: 8, nbits_value: 4, axis_value: 1}}}}", "values are stored per token"),
    (f"layers: {{0-4: {FOUR}}}", "model cannot be used: it is missing"),
    (f"model: null\nlayers: {{0-4: {FOUR}}}", "names no model"),
    ("layers: [", "not YAML or JSON"),
    ("[1, 2]", "a plan is a mapping"),
    ('{"layer_bits": {"0": 8, "0-1": 4}}', "gives layer 0 two formats"),
    ('{"layer_bits": {"0": 3}}', "input should be 16, 8, 4 or 2"),
    ('{"layer_bits": {"0": 8}, "bits": 4}', "no bits: take it out"),
    ('{"layer_bits": [8, 4]}', "is not a mapping"),
])
def test_a_wrong_plan_is_one_sentence_that_names_the_file(load, text, match):
    with pytest.raises(ConfigError, match=match) as refused:
        load(text)
    assert "plan.yaml" in str(refused.value)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [{"architecture": "Qwen2ForCausalLM"}, {"layers": 6}, {"kv_heads": 1},
                                    {"head_dim": 128}, {"sha256": "cd"}])
def test_a_plan_of_another_model_is_refused(change):
    plan = plan_file([LayerFormat(4, 4)] * 5, MODEL, Provenance("a test"))
    served = ModelIdentity(**{**{name: getattr(MODEL, name) for name in ("architecture", "layers", "kv_heads",
                                                                         "head_dim", "sha256")}, **change})
    with pytest.raises(ConfigError, match="choose a plan made for this model"):
        plan.formats(served, served.layers)
    assert plan.formats(MODEL, 5)


def test_a_plan_keeps_its_pages_and_its_name(tmp_path):
    plan = plan_file([LayerFormat(4, 4)] * 5, MODEL, Provenance("a test"), page_size=128, name="mine_4bit")
    write_plan(tmp_path / "plan.yaml", plan)
    assert load_plan(tmp_path / "plan.yaml") == plan
    assert plan.page_tokens(None) == plan.page_tokens(128) == 128
    with pytest.raises(ConfigError, match="the plan is for pages of 128 tokens"):
        plan.page_tokens(64)
    with pytest.raises(ConfigError, match="per channel"):
        write_plan(tmp_path / "other.yaml", plan_file([LayerFormat(4, 4)] * 5, MODEL, Provenance("a test"),
                                                      page_size=1))


def test_a_plan_does_not_ask_for_weights_that_nobody_can_name():
    plan = plan_file([LayerFormat(4, 4)] * 5, MODEL, Provenance("a test"))
    assert plan.formats(ModelIdentity("LlamaForCausalLM", 5, 3, 64), 5)
