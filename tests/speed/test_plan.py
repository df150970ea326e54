"""What an engine is started with: the same for every format but for the format, and wrong wishes are one sentence."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.serving.checkpoint import prepare_checkpoint
from kvtuner_sglang.speed import plan

CONF = Path(__file__).parents[2] / "conf"


def load(*words: str):
    return command_line.load(["task=speed", "model=tiny_dummy", "speed=tiny", *words], CONF)


def arguments(*words, device="cuda"):
    config = load("speed=standard", *words)
    checkpoint = prepare_checkpoint(config.model.source, None)
    return plan.engine_arguments(config, checkpoint, device, "bfloat16", 48, 20000)


@pytest.mark.parametrize(("words", "part"), [
    (["quant=kv4", "speed.backend=triton"], "leave speed.backend"),
    (["speed.new_tokens=[8,9]"], "at least twice"),
    (["speed.context_length=200"], "raise it or choose shorter"),
    (["speed.decode=[]", "speed.ttft_tokens=[]", "speed.ttft_cached=[]"], "measures nothing"),
    (["speed.mem_fraction_static=1.5"], "speed.mem_fraction_static"),
    (["speed.decode=[{batch:0,context:8}]"], "speed.decode"),
    (["dist=tp2"], "choose dist=single"),
    (["speed.backend=fa3"], "speed.backend"),
    (["quant=fp8", "task=quality", "model=smollm2_135m"], "only task=speed"),
    (["task=quality"], "random weights"),
])
def test_wrong_wishes_are_one_sentence(words, part):
    with pytest.raises(ConfigError, match=part) as refused:
        load(*words)
    assert "\n" not in str(refused.value)


def test_formats_differ_in_nothing_but_the_format():
    bf16, triton, fp8, kv4 = (arguments(*words) for words in (
        ["quant=bf16"], ["quant=bf16", "speed.backend=triton"], ["quant=fp8"], ["quant=kv4"]))
    own = {"attention_backend", "kv_cache_dtype", "enable_kvtuner_quant"}
    assert bf16["attention_backend"] == fp8["attention_backend"] == "flashinfer"
    assert triton["attention_backend"] == "triton"
    assert fp8["kv_cache_dtype"] == "fp8_e4m3"
    assert kv4["enable_kvtuner_quant"]
    assert "attention_backend" not in kv4
    assert "kvtuner_kv_gib" not in kv4
    shared = [{k: v for k, v in each.items() if k not in own} for each in (bf16, triton, fp8, kv4)]
    assert shared.count(shared[0]) == 4
    assert bf16["mem_fraction_static"] == 0.85
    assert bf16["cuda_graph_max_bs_decode"] == bf16["max_running_requests"] == 48
    assert bf16["cuda_graph_backend_prefill"] == "disabled"
    assert bf16["load_format"] == "dummy"
    assert "cuda_graph_backend_prefill" not in arguments("quant=bf16", "speed.prefill_cuda_graph=true")


def test_cells_of_a_context_follow_each_other():
    decode = [(c.context, c.batch) for c in plan.cells_of(load("speed=standard")) if c.workload == "decode"]
    assert decode == sorted(decode)
    assert [c.workload for c in plan.cells_of(load("speed=standard"))][-1] == "saturation"


def test_saturation_asks_for_as_many_slots_as_the_budget_can_hold():
    config = command_line.load(["task=speed", "model=qwen2_5_7b_dummy", "quant=bf16"], CONF)
    checkpoint = prepare_checkpoint(config.model.source, None)
    per_token = 28 * 2 * 4 * 128 * 2
    budget = 100 * per_token * (16384 + config.speed.outputs_per_request + 1)
    assert plan.max_running_requests(config, checkpoint, "bfloat16", budget) == 101
    assert plan.max_running_requests(config, checkpoint, "bfloat16", budget / 10) == 64
    fp8 = command_line.load(["task=speed", "model=qwen2_5_7b_dummy", "quant=fp8"], CONF)
    assert plan.max_running_requests(fp8, checkpoint, "bfloat16", budget) == 201


def test_runs_of_different_backends_have_different_names():
    names = {load(*words).run_dir.name for words in (["quant=bf16"], ["quant=bf16", "speed.backend=triton"],
                                                     ["quant=fp8"], ["quant=bf16", "speed.repeats=3"])}
    assert len(names) == 4
    workload = command_line.load(["workload=seed_report"], CONF).workload
    assert replace(load(), workload=workload).run_dir == load().run_dir


def test_the_shape_of_qwen_7b_has_its_parameters():
    checkpoint = prepare_checkpoint("dummy:qwen2_5_7b", None)
    assert checkpoint.parameters == 7_615_616_512
    assert (checkpoint.path / "config.json").is_file()
    assert not list(checkpoint.path.glob("*.safetensors"))
