"""The whole task on a tiny model: what it leaves, that it resumes, and what is published of it."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.errors import ConfigError, MeasurementInvalid, UserError
from kvtuner_sglang.evidence.record import load_record, write_record
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.quality import compare
from kvtuner_sglang.quant.plan_file import ModelIdentity, load_plan
from kvtuner_sglang.tuner import compare_plans, config, scoring
from kvtuner_sglang.tuner.figures import of_kind
from kvtuner_sglang.tuner.held_out import require_disjoint
from kvtuner_sglang.tuner.menu import effective_bits, pair_name
from kvtuner_sglang.tuner.publish import COLUMNS, main, publish
from kvtuner_sglang.tuner.report import render, verdicts

CONF = Path(__file__).parents[2] / "conf"
FILES = {"record.json", "requests.jsonl", "plan.yaml", "report.md", "study.db",
         *(f"{name}{suffix}" for name in ("sensitivity", "pareto", "additive") for suffix in (".pdf", ".png"))}
IDENTITY = ModelIdentity("LlamaForCausalLM", 3, 2, 64)


class KilledError(Exception):
    """Stands for the end of the process."""


def test_a_finished_run_leaves_everything(finished_run):
    assert {path.name for path in finished_run.iterdir()} == FILES
    record = load_record(finished_run)
    assert record.status == "ok"
    assert record.metrics["tuned_effective_bits"].mean <= 6.0 + 1e-6
    roles = {row["role"] for row in of_kind(read_samples(finished_run), "compared")}
    assert {"tuned", "additive", "uniform", "uniform_menu", "first_last", "random"} <= roles


def test_the_plan_is_the_candidate_of_least_kl(finished_run):
    samples = read_samples(finished_run)
    best = min(of_kind(samples, "candidate"), key=lambda row: row["kl"])
    plan = load_plan(finished_run / "plan.yaml").formats(IDENTITY, 3)
    assert [pair_name(fmt) for fmt in plan] == best["plan"] == of_kind(samples, "compared")[0]["plan"]
    assert effective_bits(plan, 64, 64) == pytest.approx(best["effective_bits"])
    assert len(of_kind(samples, "layer")) == 3


def test_a_killed_run_goes_on_and_ends_the_same(finished_run, run_tune, tmp_path, monkeypatch):
    """Killed among the sensitivities, in the search and in the comparison."""
    scored, held_out = scoring.Scorer.kl, compare_plans.HeldOutText.score
    calls = []

    def killed_at(number, method):
        def call(self, *arguments):
            if len(calls) == number:
                raise KilledError
            calls.append(arguments)
            return method(self, *arguments)
        return call

    for number in (4, 12, 20):
        monkeypatch.setattr(scoring.Scorer, "kl", killed_at(number, scored))
        monkeypatch.setattr(compare_plans.HeldOutText, "score", killed_at(number, held_out))
        with pytest.raises(KilledError):
            run_tune(tmp_path)
        assert not list((tmp_path / "runs").glob("*/record.json"))
    monkeypatch.setattr(scoring.Scorer, "kl", killed_at(-1, scored))
    monkeypatch.setattr(compare_plans.HeldOutText, "score", killed_at(-1, held_out))
    run_tune(tmp_path)
    assert len({str(call) for call in calls}) == len(calls)  # nothing was scored twice
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert_same(read_samples(run_dir), read_samples(finished_run))


def assert_same(found, expected):
    """Equal, but for what float32 sums differ by from one run to another: their order is the threads' own."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected)


def test_the_report_says_what_was_missed(finished_run):
    record, samples = load_record(finished_run), read_samples(finished_run)
    compared = of_kind(samples, "compared")
    for factor, word in ((0.4, "held"), (0.6, "missed")):
        uniform = next(row for row in compared if row["compared"] == "uniform")
        lines = verdicts([{**compared[0], "kl": uniform["kl"] * factor}, uniform])
        assert len(lines) == 1
        assert lines[0].endswith(f"{factor:.2f} (0.5 or less: {word})")
    text = render(record, samples)
    assert all(row["name"] in text for row in compared)
    assert f"{compared[0]['kl']:.4f} +- {compared[0]['kl_se']:.4f}" in text


def test_texts_that_overlap_are_refused():
    text = list(range(100))
    require_disjoint([text[:40]], [text[17:]])  # 23 tokens
    with pytest.raises(MeasurementInvalid, match="share 1 runs"):
        require_disjoint([text[:40]], [text[16:]])


@pytest.mark.parametrize(("words", "part"), [
    (["tune.calibration_window=100"], "two pages"), (["tune.calibration_tokens=1000"], "whole windows"),
    (["tune.heldout_tokens=199"], "standard error"),
    (["tune.values=[4b]"], "4 bits can be boosted"), (["tune.keys=[3]"], "tune.keys"), (["tune.bits=0"], "tune.bits"),
])
def test_bad_settings_are_one_sentence(words, part, run_tune, tmp_path):
    with pytest.raises(ConfigError, match=part):
        run_tune(tmp_path, *words)
    assert not (tmp_path / "runs").exists()


def test_the_least_held_out_text_is_two_blocks_of_its_error():
    assert config.BLOCK_TOKENS == compare.BLOCK_TOKENS


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "tune").glob("*.yaml")))
def test_every_file_of_conf_tune_composes(name):
    assert command_line.load([f"tune={name}", "task=tune"], CONF).tune.name == name


def clean(run_dir, folder):
    """A copy of the run as a checkout without changes would have made it."""
    copy = folder / run_dir.name
    shutil.copytree(run_dir, copy)
    record = load_record(copy)
    environment = record.environment.model_copy(update={
        "git_sha": "a" * 40, "git_dirty": False,
        "unknown": {k: v for k, v in record.environment.unknown.items() if not k.startswith("git")}})
    write_record(copy, record.model_copy(update={"environment": environment}))
    return copy


def test_a_published_folder_has_a_row_for_every_kind(finished_run, tmp_path):
    folder = tmp_path / "published" / "tuner"
    run_dir = clean(finished_run, tmp_path)
    publish([run_dir], folder)
    frame = pd.read_csv(folder / "summary.csv")
    assert tuple(frame.columns) == COLUMNS
    assert {"tuned", "additive", "uniform", "first_last", "random_median", "full_precision"} <= set(frame["plan"])
    assert set(frame["commit"]) == {"a" * 12}
    tuned = frame[frame["plan"] == "tuned"].iloc[0]
    record = load_record(run_dir)
    assert tuned["kl_heldout"] == pytest.approx(record.metrics["tuned_kl_nats"].mean, rel=1e-4)
    drawn = of_kind(read_samples(run_dir), "compared")
    random_kl = sorted(row["kl"] for row in drawn if row["role"] == "random")
    median = frame[frame["plan"] == "random_median"].iloc[0]["kl_heldout"]
    assert median == pytest.approx(random_kl[(len(random_kl) - 1) // 2], rel=1e-4)
    before = {path.name: path.read_bytes() for path in folder.rglob("*.p*")}
    publish([folder / run_dir.name], folder)
    assert {path.name: path.read_bytes() for path in folder.rglob("*.p*")} == before
    assert (folder / "SHA256SUMS").read_text().count("\n") == 2 + 2 + 6 + 1


def test_only_a_finished_run_with_a_plan_is_published(finished_run, tmp_path):
    run_dir = clean(finished_run, tmp_path)
    (run_dir / "plan.yaml").unlink()
    with pytest.raises(UserError, match=r"plan.yaml"):
        publish([run_dir], tmp_path / "tuner")
    with pytest.raises(SystemExit, match="run it first"):
        main([str(tmp_path / "nothing"), str(tmp_path / "tuner")])
    assert not (tmp_path / "tuner").exists()


def test_a_tune_run_depends_on_nothing_but_what_it_uses():
    def hash_of(*words):
        return command_line.load(["task=tune", *words], CONF).config_hash

    assert hash_of() == hash_of("quant=kv8") == hash_of("dist=tp2")
    assert len({hash_of(), hash_of("tune.bits=3.25"), hash_of("seed=1"), hash_of("server.device=cpu")}) == 4
