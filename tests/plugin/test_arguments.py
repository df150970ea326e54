"""Which SGLang arguments start beside quantization: the real parser, the real ServerArgs, every hook in place."""

import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.server_args import ServerArgs, prepare_server_args
from tiny_models import save_tiny

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.plugin import arguments, entry
from kvtuner_sglang.plugin.options import options_of

load_plugins()
QUANTIZED = ["--enable-kvtuner-quant", "--kvtuner-nbits-key", "4", "--kvtuner-nbits-value", "4"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama"))


def start(model: str, *words: str) -> ServerArgs:
    return prepare_server_args(["--model-path", model, "--device", "cpu", *words])


def refusal(model: str, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        start(model, *words)
    assert isinstance(stopped.value.code, str), "a sentence, which also makes the exit code 1"
    assert stopped.value.code.startswith("kvtuner: ")
    return stopped.value.code


def test_quantization_brings_its_own_backend_and_page(llama):
    args = start(llama, *QUANTIZED)
    assert (args.attention_backend, args.page_size, args.max_running_requests) == ("kvtuner", 64, 8)
    assert options_of(args).plan(1)[0].key.per_channel
    assert start(llama, *QUANTIZED, "--page-size", "128").page_size == 128
    assert start(llama, *QUANTIZED, "--max-running-requests", "3").max_running_requests == 3
    token = start(llama, *QUANTIZED, "--kvtuner-axis-key", "0")
    assert token.page_size == 1


def test_a_residual_window_is_refused_with_the_reason(llama):
    assert "prefix cache shares pages" in refusal(llama, *QUANTIZED, "--kvtuner-residual-length", "128")
    assert start(llama, *QUANTIZED, "--kvtuner-residual-length", "0")


def test_without_quantization_sglang_is_left_alone(llama):
    for words in ([], ["--enable-kvtuner-quant=False", "--kvtuner-kv-gib", "1"]):
        args = start(llama, *words)
        assert args.attention_backend in ("torch_native", "intel_amx")
        assert not options_of(args).enabled


@pytest.mark.parametrize(
    "words",
    [
        ["--enable-hierarchical-cache"],
        ["--disaggregation-mode", "prefill"],
        ["--speculative-algorithm", "NGRAM"],
        ["--kv-cache-dtype", "fp8_e5m2"],
        ["--enable-dp-attention"],
        ["--attention-backend", "triton"],
        ["--page-size", "16"],
        ["--enable-lmcache"],
        ["--enable-unified-memory"],
        ["--dp-size", "2"],
    ],
)
def test_what_no_test_covers_is_refused_by_name(llama, words):
    assert words[0] in refusal(llama, *QUANTIZED, *words)


@pytest.mark.parametrize("words", [["--enable-hierarchical-cache"], ["--attention-backend", "torch_native"]])
def test_the_same_arguments_pass_without_quantization(llama, words):
    assert start(llama, *words)


def test_mixed_chunks_are_for_the_reference_attention(llama, monkeypatch):
    assert start(llama, *QUANTIZED, "--enable-mixed-chunk").enable_mixed_chunk
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ConfigError, match="--enable-mixed-chunk makes every decode step"):
        ServerArgs(model_path=llama, device="cuda", enable_kvtuner_quant=True, enable_mixed_chunk=True)


def test_the_device_that_sglang_chose_is_looked_at(llama, monkeypatch):
    seen = []
    monkeypatch.setattr(arguments, "refuse_other_devices", seen.append)
    start(llama, *QUANTIZED)
    assert seen == ["cpu"]


def test_boosted_keys_are_not_copied_over_ranks(llama):
    sentence = refusal(llama, *QUANTIZED, "--tp-size", "4")
    assert "at most --tp-size 2" in sentence
    assert start(llama, *QUANTIZED, "--tp-size", "4", "--kvtuner-key-boost", "False").tp_size == 4
    assert start(llama, *QUANTIZED, "--tp-size", "2").tp_size == 2


def test_an_architecture_that_no_test_covers_is_refused(tmp_path):
    model = save_tiny(tmp_path / "gpt_neox", "gpt_neox")
    assert "GPTNeoXForCausalLM" in refusal(str(model), *QUANTIZED)


def test_a_group_that_does_not_divide_the_head_is_refused(llama):
    sentence = refusal(llama, *QUANTIZED, "--kvtuner-axis-key", "0", "--kvtuner-q-group-size", "24")
    assert "24" in sentence
    assert "head_dim 32" in sentence


def test_another_sglang_version_is_refused(llama, monkeypatch):
    monkeypatch.setattr("sglang.__version__", "0.5.99")
    assert "sglang==0.5.17" in refusal(llama, *QUANTIZED)
    assert start(llama)


def test_a_renamed_hook_target_is_refused(llama, monkeypatch):
    monkeypatch.setattr(arguments, "_broken_targets", [])
    renamed = f"{entry.CONFIGURATOR}._build_mha_kv_pool_renamed"
    monkeypatch.setattr(entry, "HOOKS", ((renamed, None, HookType.AROUND),))
    entry.register()
    assert renamed in refusal(llama, *QUANTIZED)
    assert start(llama)


def test_engine_keywords_take_the_same_path(llama):
    args = ServerArgs(model_path=llama, device="cpu", enable_kvtuner_quant=True, kvtuner_nbits_key=8)
    assert (args.attention_backend, options_of(args).kvtuner_nbits_key) == ("kvtuner", 8)
    with pytest.raises(ConfigError, match="enable-hierarchical-cache"):
        ServerArgs(model_path=llama, device="cpu", enable_kvtuner_quant=True, enable_hierarchical_cache=True)
    with pytest.raises(ConfigError, match="not a kvtuner option"):
        ServerArgs(model_path=llama, device="cpu", enable_kvtuner_quant=True, kvtuner_bits=4)


IDENTITY = "model: {architecture: LlamaForCausalLM, layers: 2, kv_heads: 2, head_dim: 32}\n"
TOKEN8, CHANNEL4 = "{nbits_key: 8, nbits_value: 8, axis_key: 0}", "{nbits_key: 4, nbits_value: 4, key_boost: false}"


@pytest.fixture
def plan(tmp_path):
    """Writes a plan and gives the flags that ask for it."""

    def write(text: str) -> list[str]:
        (tmp_path / "plan.yaml").write_text(text)
        return ["--enable-kvtuner-quant", "--kvtuner-layer-config-file", str(tmp_path / "plan.yaml")]

    return write


def test_all_layers_of_a_plan_share_one_page(llama, plan):
    assert start(llama, *plan(f"{IDENTITY}layers: {{0: {TOKEN8}, 1: {CHANNEL4}}}")).page_size == 64
    assert start(llama, *plan(f"{IDENTITY}layers: {{0-1: {TOKEN8}}}")).page_size == 1
    mixed = plan(f"{IDENTITY}layers: {{0: {TOKEN8}, 1: {CHANNEL4}}}")
    assert start(llama, *mixed, "--page-size", "128").page_size == 128
    assert "choose 64 or 128" in refusal(llama, *mixed, "--page-size", "1")


@pytest.mark.parametrize(("text", "parts"), [
    (f"{IDENTITY}layers: {{0: {TOKEN8}}}", ("layer 1", "give the plan a default")),
    (f"{IDENTITY}layers: {{0-2: {TOKEN8}}}", ("layer 2", "layers 0 to 1")),
    (f"{IDENTITY}layers: {{0-1: {TOKEN8}, 1: {CHANNEL4}}}", ("layer 1 two formats",)),
    (f"{IDENTITY}layers: {{0-1: {{nbits_key: 3, nbits_value: 8}}}}", ("nbits_key=3", "16, 8, 4 or 2")),
    (f"{IDENTITY.replace('layers: 2', 'layers: 3')}default: {TOKEN8}\nlayers: {{}}", ("layers 3", "has layers 2")),
    (f"{IDENTITY.replace('Llama', 'Qwen2')}default: {TOKEN8}\nlayers: {{}}", ("architecture Qwen2ForCausalLM",)),
    (f"{IDENTITY.replace('kv_heads: 2', 'kv_heads: 4')}default: {TOKEN8}\nlayers: {{}}", ("kv_heads 4",)),
    ('{"layer_bits": {"0": 8}}', ("layer 1",)),
    ('{"layer_bits": {"0-2": 8}}', ("layer 2",)),
])
def test_a_plan_that_does_not_fit_stops_the_start(llama, plan, text, parts):
    sentence = refusal(llama, *plan(text))
    assert all(part in sentence for part in parts), sentence
    assert "plan.yaml" in sentence
