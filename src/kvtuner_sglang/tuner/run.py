"""A whole tuning of one model: sensitivity, pruning, clustering, search, and the check on held-out text."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
import transformers

from kvtuner_sglang.evidence.record import Environment
from kvtuner_sglang.quality.prose import CALIBRATION, prose_windows
from kvtuner_sglang.quality.transformers_path import load_model, load_tokenizer
from kvtuner_sglang.quant.plan_file import ModelIdentity
from kvtuner_sglang.serving.checkpoint import Checkpoint
from kvtuner_sglang.tuner import clustering, compare_plans, knapsack, menu, pruning, search, sensitivity
from kvtuner_sglang.tuner.clustering import Cluster, clusters_of
from kvtuner_sglang.tuner.compare_plans import Compared
from kvtuner_sglang.tuner.config import TuneConfig
from kvtuner_sglang.tuner.held_out import HeldOutText, RecallPrompts, require_disjoint
from kvtuner_sglang.tuner.menu import Menu, Plan, pair_name
from kvtuner_sglang.tuner.pruning import surviving
from kvtuner_sglang.tuner.samples import CandidateSample, FullPrecisionSample, LayerSample, SearchSample
from kvtuner_sglang.tuner.score_book import SCORED_BY, ScoreBook, fingerprint
from kvtuner_sglang.tuner.scoring import Scorer
from kvtuner_sglang.tuner.search import Candidate, Found, Space, by_layer, front
from kvtuner_sglang.tuner.sensitivity import Sensitivity

Say = Callable[[str], None]
# What decides which plans are tried: a study that other code filled is not gone on with.
SEARCHED_BY = (sys.modules[__name__], search, clustering, pruning, knapsack, sensitivity, menu)


@dataclass(frozen=True)
class Tuned:
    """All that a tuning found; `chosen` is the plan of least KL on calibration text within the budget.

    asked: tune.candidates.  candidates: what the search found and the additive model's plan layer by layer.
    positions: of calibration text, that a KL is the mean of.  scores, reused: how many were needed, and of those how
    many were in the cache.
    """

    menu: Menu
    sensitivity: Sensitivity
    surviving: list[tuple[int, ...]]
    clusters: list[Cluster]
    asked: int
    found: Found
    candidates: list[Candidate]
    chosen: Candidate
    compared: list[Compared]
    recall_full: tuple[bool, ...]
    positions: int
    scores: int
    reused: int


@dataclass(frozen=True)
class Bench:
    """A model, its texts as token ids, and the file where scores are kept."""

    model: Any
    tokenizer: Any
    calibration: list[list[int]]
    held_out: list[list[int]]
    scores: Path

    def study(self, config_hash: str) -> Path:
        """The file of the search of this configuration by this code."""
        searched_by = fingerprint(SEARCHED_BY, optuna.__version__, np.__version__)
        return self.scores.with_name(f"{self.scores.stem}-study-{config_hash}-{searched_by}.db")


def load_bench(checkpoint: Checkpoint, tune: TuneConfig, device: str, environment: Environment, folder: Path) -> Bench:
    """Everything in float32; raises MeasurementInvalid if the texts overlap."""
    tokenizer = load_tokenizer(checkpoint.path)
    calibration = prose_windows(tokenizer, tune.calibration_tokens, tune.calibration_window, CALIBRATION,
                                "tune.calibration_tokens")
    held_out = prose_windows(tokenizer, tune.heldout_tokens, tune.heldout_window, option="tune.heldout_tokens")
    require_disjoint(calibration, held_out)
    depends_on = fingerprint(SCORED_BY, checkpoint.sha256, device, environment.cpu, environment.gpus,
                             torch.__version__, transformers.__version__, tune.page_size, calibration, held_out)
    return Bench(load_model(checkpoint.path, torch.float32, device), tokenizer, calibration, held_out,
                 folder / f"scores-{depends_on}.jsonl")


def tune_model(bench: Bench, identity: ModelIdentity, tune: TuneConfig, seed: int, study: Path, say: Say) -> Tuned:
    """Find a plan and compare it. What the files `bench.scores` and `study` hold already is not computed again."""
    menu = Menu(tune.keys, tune.values, identity.head_dim, tune.page_size)
    book = ScoreBook(bench.scores)
    scorer = Scorer(bench.model, bench.calibration, tune.page_size)
    found = sensitivity.measure(scorer, menu, book, say)
    pair_bits = [menu.bits([pair]) for pair in menu.pairs]
    kept = surviving(pair_bits, found.kl)
    clusters = clusters_of(kept, found.kl, tune.cluster_eps)
    say(f"pruning: {sum(map(len, kept)) / len(kept):.1f} of {len(menu.pairs)} pairs a layer survive; "
        f"{len(clusters)} clusters of {scorer.layers} layers")
    space, kl_of = Space(menu, clusters, found, tune.bits), _kl_by_book(scorer, book)
    additive = by_layer(space, kept, kl_of)
    searched = search.search(space, kl_of, study, population=tune.population, candidates=tune.candidates, seed=seed,
                             say=say)
    for candidate in searched.candidates:
        kl_of(candidate.plan)  # known; the book counts those of an earlier process, too
    candidates = [*searched.candidates, additive]
    chosen = min(candidates, key=lambda candidate: candidate.kl)
    compared, recall_full = _check(bench, identity, tune, seed, menu, kept, candidates, chosen, additive.plan, book,
                                   say)
    return Tuned(menu, found, kept, clusters, tune.candidates, searched, candidates, chosen, compared, recall_full,
                 scorer.positions, len(book.used), book.reused)


def _kl_by_book(scorer: Scorer, book: ScoreBook) -> Callable[[Plan], float]:
    return lambda plan: book.get(f"plan {', '.join(map(pair_name, plan))}", lambda: scorer.kl(plan))


def _check(bench: Bench, identity: ModelIdentity, tune: TuneConfig, seed: int, menu: Menu,
           kept: Sequence[tuple[int, ...]], candidates: Sequence[Candidate], chosen: Candidate, additive: Plan,
           book: ScoreBook, say: Say) -> tuple[list[Compared], tuple[bool, ...]]:
    """The chosen plan, the front and the baselines on held-out text and prompts."""
    whole = front(candidates)
    shown = np.unique(np.linspace(0, len(whole) - 1, tune.front_plans).round().astype(int))
    best = [whole[i].plan for i in shown]
    plans = compare_plans.plans_to_compare(chosen.plan, best, additive, menu, kept, identity, tune, seed)
    text = HeldOutText(bench.model, bench.held_out)
    prompts = RecallPrompts(bench.model, bench.tokenizer, tune.recall_items, seed, tune.recall_batch)
    compared = compare_plans.compare(plans, text, prompts, tune, book, say)
    full = tuple(book.get(f"recall {prompts.name} full precision", lambda: prompts.right(None, tune.page_size)))
    say(f"recall: full precision: {sum(full)} of {len(full)}")
    return compared, full


def samples(tuned: Tuned) -> list[Any]:
    """Everything that was measured, one dataclass instance a line of the samples file."""
    names = tuple(map(pair_name, tuned.menu.pairs))
    bits = tuple(tuned.menu.bits([pair]) for pair in tuned.menu.pairs)
    cluster_of = {layer: cluster.layers for cluster in tuned.clusters for layer in cluster.layers}
    layers = [LayerSample("layer", layer, names, bits, tuple(tuned.sensitivity.kl[layer].tolist()),
                          tuple(tuned.sensitivity.attention_error[layer].tolist()),
                          tuple(names[pair] for pair in kept), cluster_of[layer])
              for layer, kept in enumerate(tuned.surviving)]
    candidates = [CandidateSample("candidate", c.origin, c.effective_bits, c.kl, c.kl_summed,
                                  tuple(map(pair_name, c.plan))) for c in tuned.candidates]
    searched = SearchSample("search", tuned.asked, len(tuned.found.candidates), tuned.found.trials,
                            tuned.found.infeasible, tuned.found.repeated, tuned.scores, tuned.reused)
    return [*layers, *candidates, searched, *(one.sample() for one in tuned.compared),
            FullPrecisionSample("full_precision", tuned.recall_full)]
