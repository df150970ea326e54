"""The whole task on a tiny model: what it leaves, that it resumes, and what is published of it."""

import inspect
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch
import transformers

from kvtuner_sglang import command_line
from kvtuner_sglang.errors import ConfigError, MeasurementInvalid, UserError
from kvtuner_sglang.evidence.environment import collect_environment
from kvtuner_sglang.evidence.record import load_record, write_record
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.quality import compare
from kvtuner_sglang.quant import format as quant_format
from kvtuner_sglang.quant import format_hash
from kvtuner_sglang.quant.plan_file import LayerFormat, ModelIdentity, load_plan, plan_file, write_plan
from kvtuner_sglang.serving.checkpoint import prepare_checkpoint
from kvtuner_sglang.tasks import tune as task
from kvtuner_sglang.tuner import (
    clustering,
    compare_plans,
    config,
    held_out,
    knapsack,
    menu,
    pruning,
    scoring,
    search,
    sensitivity,
)
from kvtuner_sglang.tuner import run as run_module
from kvtuner_sglang.tuner.baselines import Baseline
from kvtuner_sglang.tuner.compare_plans import Compared
from kvtuner_sglang.tuner.figures import of_kind
from kvtuner_sglang.tuner.held_out import HeldOut, require_disjoint
from kvtuner_sglang.tuner.menu import effective_bits, pair_name
from kvtuner_sglang.tuner.metrics import short_of_plans, warnings_of
from kvtuner_sglang.tuner.publish import COLUMNS, main, publish
from kvtuner_sglang.tuner.report import render, verdicts
from kvtuner_sglang.tuner.run import Bench, load_bench
from kvtuner_sglang.tuner.score_book import SCORED_BY, fingerprint
from kvtuner_sglang.tuner.search import Found

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
    (searched,) = of_kind(read_samples(finished_run), "search")
    assert record.metrics["search_plans"].mean == searched["candidates"]
    assert record.metrics["search_plans"].n == searched["trials"]
    assert searched["trials"] == searched["candidates"] + searched["infeasible"] + searched["repeated"]
    assert record.metrics["calibration_kl_nats"].n == 256 - 128
    assert record.metrics["tuned_kl_nats"].n == 400 - 128
    assert record.metrics["scores_reused"].mean == 0
    roles = {row["role"] for row in of_kind(read_samples(finished_run), "compared")}
    assert {"tuned", "additive", "uniform", "uniform_menu", "first_last", "random"} <= roles


def test_the_plan_is_the_candidate_of_least_kl(finished_run):
    samples = read_samples(finished_run)
    candidates = of_kind(samples, "candidate")
    best = min(candidates, key=lambda row: row["kl"])
    (additive,) = [row["plan"] for row in of_kind(samples, "compared") if row["role"] == "additive"]
    assert [row["plan"] for row in candidates if row["origin"] == "additive_by_layer"] == [additive]
    file = load_plan(finished_run / "plan.yaml")
    plan = file.formats(IDENTITY, 3)
    assert file.page_size == file.page_tokens(None) == 64
    assert file.name == f"tiny_6bit_page64_{format_hash(plan)[:8]}"
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
    resumed, whole = ([row for row in read_samples(folder) if row["kind"] != "search"]
                      for folder in (run_dir, finished_run))
    assert_same(resumed, whole)
    assert load_record(run_dir).metrics["scores_reused"].mean == 20 + 4  # and each pair's attention errors


def test_what_is_in_the_cache_is_reused_and_counted_and_never_with_force(run_tune, tmp_path):
    reused = []
    for name, *words in (("first",), ("second",), ("third", "force=true")):
        run_tune(tmp_path, f"runs_dir={tmp_path / name}", *words)
        (run_dir,) = (tmp_path / name).iterdir()
        (searched,) = of_kind(read_samples(run_dir), "search")
        reused.append((searched["reused"], searched["scores"]))
        assert f"{reused[-1][0]} were in the cache" in (run_dir / "report.md").read_text()
    scores = reused[0][1]
    assert reused == [(0, scores), (scores, scores), (0, scores)]


@pytest.mark.parametrize(("module", "scores_differ"), [
    (search, False), (clustering, False), (pruning, False), (knapsack, False), (sensitivity, False),
    (held_out, True), (scoring, True), (quant_format, True), (menu, True),
])
def test_other_code_takes_over_neither_a_study_nor_scores(module, scores_differ, tmp_path, monkeypatch):
    def names():
        bench = Bench(None, None, [], [], tmp_path / f"scores-{fingerprint(SCORED_BY)}.jsonl")
        return bench.scores, bench.study("0" * 10)

    scores, study = names()
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda of: source(of) + ("# changed" if of is module else ""))
    assert (names()[0] != scores) == scores_differ
    assert names()[1] != study


def test_another_version_of_optuna_begins_a_study_of_its_own(tmp_path, monkeypatch):
    bench = Bench(None, None, [], [], tmp_path / "scores.jsonl")
    study = bench.study("0" * 10)
    monkeypatch.setattr(optuna, "__version__", "0")
    assert bench.study("0" * 10) != study


def test_scores_of_another_machine_or_library_are_not_taken_over(byte_checkpoint, tmp_path, monkeypatch):
    checkpoint = prepare_checkpoint("path", str(byte_checkpoint), print)
    tune = command_line.load(["task=tune", "tune=tiny"], CONF).tune
    here = collect_environment()
    monkeypatch.setattr(run_module, "load_model", lambda *args: None)

    def scores(environment=here):
        return load_bench(checkpoint, tune, "cpu", environment, tmp_path).scores

    found = [scores(), scores(here.model_copy(update={"cpu": "another"})),
             scores(here.model_copy(update={"gpus": ("another",)}))]
    for library in (torch, transformers):
        with monkeypatch.context() as patch:
            patch.setattr(library, "__version__", "0")
            found.append(scores())
    assert len(set(found)) == 5
    assert scores() == found[0]


def test_a_search_that_runs_short_is_a_warning(finished_run):
    assert short_of_plans(Found([None] * 4, 3, 1), 4) == ()
    (warning,) = short_of_plans(Found([None] * 35, 100, 65), 40)
    assert warning.startswith("the search found 35 of 40 plans: 200 trials ran out")
    samples = read_samples(finished_run)
    short = [{**row, "candidates": 35, "asked": 40, "trials": 200} if row["kind"] == "search" else row
             for row in samples]
    assert "35 of 40 plans: 200 trials" in render(load_record(finished_run), short)


def test_a_plan_that_is_the_additive_one_is_not_warned_of():
    plan = Baseline("tuned", "tuned", (), 64, 4.0)
    tuned, same = (Compared(plan, HeldOut(0.1, 0.0, 1.0, 200), kind) for kind in ("tuned", "additive"))
    other = Compared(Baseline("uniform", "kv4", ("another",), 64, 4.0), HeldOut(0.05, 0.0, 1.0, 200), "uniform")
    assert [line for line in warnings_of([tuned, same, other]) if "kv4" not in line] == []
    assert len(warnings_of([tuned, same, other])) == 1


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
        assert lines[0].endswith(f"{factor:.3f} (0.5 or less: {word})")
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
    (["tune.heldout_window=200", "tune.heldout_tokens=400"], "tune.heldout_window=200 does not fit: give at least two"),
    (["tune.heldout_tokens=700"], "whole windows"),
    (["tune.heldout_window=300", "tune.heldout_tokens=300"], "standard error"),
    (["tune.keys=[4,4]"], r"tune.keys=\[4, 4\] offers a format twice"),
    (["tune.bits=3"], "tune.bits=3 cannot be kept"),
    (["tune.values=[4b]"], "4 bits can be boosted"), (["tune.keys=[3]"], "tune.keys"), (["tune.bits=0"], "tune.bits"),
])
def test_bad_settings_are_one_sentence(words, part, run_tune, tmp_path):
    with pytest.raises(ConfigError, match=part):
        run_tune(tmp_path, *words)
    assert not (tmp_path / "runs").exists()


def test_numbers_on_the_command_line_are_formats():
    words = ["task=tune", "tune.keys=[4,8]", "tune.values=[2s,8]"]
    assert command_line.load(words, CONF).tune.keys == ("4", "8")


@pytest.mark.parametrize("words", [["tune.calibration_tokens=256000"], ["tune.heldout_tokens=400000"]])
def test_too_much_text_names_the_option_that_asked_for_it(words, run_tune, tmp_path):
    with pytest.raises(UserError, match=f"set {words[0].split('=')[0]}="):
        run_tune(tmp_path, *words)


@pytest.mark.parametrize(("change", "part"), [
    ({"architecture": "GraniteForCausalLM"}, "architecture GraniteForCausalLM"), ({"head_dim": 72}, "boosted"),
])
def test_a_model_that_cannot_be_tuned_is_refused_before_it_is_loaded(change, part, run_tune, tmp_path, monkeypatch):
    prepare = task.prepare_checkpoint
    monkeypatch.setattr(task, "prepare_checkpoint", lambda *args: replace(prepare(*args), **change))
    monkeypatch.setattr(task, "load_bench", lambda *args: pytest.fail("was loaded"))
    with pytest.raises(ConfigError, match=part):
        run_tune(tmp_path, "tune.keys=[4b,8]")
    assert not (tmp_path / "runs").exists()


def test_two_processes_do_not_drive_one_study(run_tune, tmp_path, monkeypatch):
    """The second waits for the first, which is this one here."""
    turns = []

    @contextmanager
    def one_at_a_time(lock, waiting):
        turns.append(lock)
        yield

    monkeypatch.setattr(task, "one_at_a_time", one_at_a_time)
    monkeypatch.setattr(task, "tune_model", lambda bench, identity, tune, seed, study, say: pytest.fail(
        "nobody held the study") if turns != [study.with_suffix(".lock")] else stop())
    with pytest.raises(KilledError):
        run_tune(tmp_path)


def stop():
    raise KilledError


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


def test_a_plan_that_is_not_its_samples_is_not_published(finished_run, tmp_path):
    run_dir = clean(finished_run, tmp_path)
    plan = load_plan(run_dir / "plan.yaml")
    others = [LayerFormat(8, 8)] * 3
    write_plan(run_dir / "plan.yaml", plan_file(others, plan.model, plan.provenance))
    with pytest.raises(UserError, match=r"plan.yaml is not the plan of the run's samples"):
        publish([run_dir], tmp_path / "tuner")
    assert not (tmp_path / "tuner").exists()


def test_a_tune_run_depends_on_nothing_but_what_it_uses():
    def hash_of(*words):
        return command_line.load(["task=tune", *words], CONF).config_hash

    others = command_line.load(["quant=kv8", "dist=tp2"], CONF)
    unread = replace(command_line.load(["task=tune"], CONF), quant=others.quant, dist=others.dist)
    assert unread.config_hash == hash_of()
    assert len({hash_of(), hash_of("tune.bits=3.25"), hash_of("seed=1"), hash_of("server.device=cpu")}) == 4
