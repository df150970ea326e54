"""What a command repeats is what the name of a run's folder depends on: one other setting, and it is another run."""

from dataclasses import replace

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.paper.claims import load_claims
from kvtuner_sglang.paper.published_folders import PUBLISHED
from kvtuner_sglang.paper.repeat import agree, compared, of_record, published_runs, repeated
from paper_project import ROOT

CONF = ROOT / "conf"
SHARED = ("seed=1", "model=qwen2_5_0_5b", "server.device=cpu")
SERVED = (*SHARED, "server.kv_gib=0.05", "quant=kv8")
OTHER = {  # of every task that leaves records: settings that make another run of it
    "serve": (*SERVED, "dist=tp2", "workload=ablation"),
    "forensics": (*SERVED, "dist=tp2_2nodes", "workload=ablation"),
    "quality": (*SHARED, "quant=kv8", "quality=standard"),
    "speed": (*SERVED, "speed=short", "speed.backend=triton"),
    "agreement": (*SERVED, "agreement.prompts=3"),
    "kernels": ("seed=1", "kernels.repeats=3"),
    "tune": (*SHARED, "tune.bits=2", "tune=tiny"),
}
BASE = {"forensics": ("workload=seed_report", "dist=tp2pp2"), "speed": ("quant=bf16",)}


def load(*words: str) -> RunConfig:
    return command_line.load(list(words), CONF)


@pytest.mark.parametrize("task", OTHER)
def test_what_makes_another_run_is_compared(task):
    words = (f"task={task}", *BASE.get(task, ()))
    one = load(*words)
    for word in OTHER[task]:
        other = load(*words, word)
        assert other.config_hash != one.config_hash
        assert not agree(compared(one.to_dict(), "cuda"), compared(other.to_dict(), "cuda")), word


def test_where_a_run_is_written_or_its_model_lies_is_not_compared():
    one = load("model=local", "model.path=/one", "model.name=m")
    other = load("model=local", "model.path=/other", "model.name=m", "tracking=disabled", "runs_dir=/elsewhere",
                 "force=true")
    unread = {"speed": load("task=speed", "speed=tiny").speed, "tune": load("task=tune", "tune=tiny").tune}
    other = replace(other, **unread)
    assert agree(compared(one.to_dict(), "cuda"), compared(other.to_dict(), "cuda"))


def test_an_older_run_is_not_blamed_for_options_that_came_later():
    config = load().to_dict()
    older = {**config, "server": {key: value for key, value in config["server"].items() if key != "attention"}}
    assert agree(compared(older, "cpu"), compared(config, "cpu"))


@pytest.mark.parametrize(("claim", "word"), [
    ("tuner-smollm2-4bit", "tune.bits=2"), ("tuner-smollm2-4bit", "tune=tiny"),
    ("tuner-smollm2-4bit", "server.device=cuda"), ("ablation-capacity", "server.kv_gib=0.05"),
    ("ablation-h100", "server.kv_gib=12"), ("ablation-h100", "workload=ablation"),
    ("ablation-capacity", "server.device=cuda"), ("forensics-ttft", "server.device=cuda"),
    ("kernels-kv4", "kernels=small"), ("engine-first-token", "speed.repeats=2"), ("kv4-smollm2", "server.device=cpu"),
])
def test_a_command_of_a_claim_with_another_setting_repeats_nothing(claim, word):
    for command in next(one for one in load_claims(ROOT).claims if one.id == claim).commands:
        words = f"{command} quant=kv4 dist=single".replace(" -m ", " ") if "exp=ablation" in command else command
        assert repeated(words, ROOT)
        assert repeated(f"{words} {word}", ROOT) == []


def test_the_device_auto_is_what_the_run_found():
    found = {run: load_record(ROOT / PUBLISHED / run) for run in published_runs(ROOT)}
    served = {run: record for run, record in found.items() if record.kv is not None}
    assert {record.kv.ranks[0].device for record in served.values()} == {"cpu", "cuda"}
    for record in served.values():
        assert of_record(record)["server"]["device"] == record.kv.ranks[0].device


def test_recipes_are_repeated_by_the_command_that_writes_them():
    recipes = "python -m kvtuner_sglang.quality.recipe_search CHECKPOINT --name smollm2_135m --out"
    assert repeated(f"{recipes} recipes-smollm2_135m.json", ROOT) == ["quality/recipes-smollm2_135m.json"]
    assert repeated(f"{recipes} recipes-another.json", ROOT) == []
    with pytest.raises(UserError, match="has no --out"):
        repeated(recipes, ROOT)
