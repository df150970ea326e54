"""Every recipe on one model in the transformers path, as one JSON file of rows:

    python -m kvtuner_sglang.quality.recipe_search MODEL_DIR --name NAME --out FILE [--device cuda] [--tokens 4000]
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.environment import collect_environment
from kvtuner_sglang.evidence.record import write_atomically
from kvtuner_sglang.quality.allocation import allocate, sensitivities
from kvtuner_sglang.quality.compare import TokenRows, block_mean, compare_logits, paired_difference, share
from kvtuner_sglang.quality.prose import CALIBRATION, prose_windows
from kvtuner_sglang.quality.recall import recall_items
from kvtuner_sglang.quality.recipe import KVRecipe, effective_bits
from kvtuner_sglang.quality.recipes import ALL, BUDGETS, LADDERS
from kvtuner_sglang.quality.transformers_path import (
    answers_greedily,
    key_statistics,
    load_model,
    load_tokenizer,
    logits,
    quantized,
)

WINDOW_TOKENS = 2000
CALIBRATION_TOKENS = 1000
RECALL_BATCH = 16


class Bench:
    """One model in full precision, and recipes measured against it."""

    def __init__(self, model_path: Path, device: str, tokens: int, recall_count: int, seed: int) -> None:
        self.device = device
        self.model = load_model(model_path, torch.float32, device)
        config = self.model.config
        self.layers = config.num_hidden_layers
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        tokenizer = load_tokenizer(model_path)
        self.windows = prose_windows(tokenizer, tokens, WINDOW_TOKENS)
        self.calibration = prose_windows(tokenizer, CALIBRATION_TOKENS, CALIBRATION_TOKENS, CALIBRATION)[0]
        self.statistics = key_statistics(self.model, self.calibration)
        self.full = [logits(self.model, window) for window in self.windows]
        items = recall_items(recall_count, seed)
        self.prompts = [tokenizer.encode(item.prompt, add_special_tokens=False) for item in items]
        self.answers = [tokenizer.encode(f"{item.prompt} {item.answer}", add_special_tokens=False)[len(prompt):]
                        for item, prompt in zip(items, self.prompts, strict=True)]
        self.recall_full = answers_greedily(self.model, self.prompts, self.answers, RECALL_BATCH)

    def row(self, name: str, plan: Sequence[KVRecipe]) -> dict[str, Any]:
        """All figures of one plan."""
        with quantized(plan, self.statistics):
            rows = TokenRows.joined([
                compare_logits(full, logits(self.model, window), window, self.device)
                for full, window in zip(self.full, self.windows, strict=True)
            ])
            right = answers_greedily(self.model, self.prompts, self.answers, RECALL_BATCH)
        kl, recall = block_mean(rows.kl), share(right)
        difference = paired_difference(right, self.recall_full)
        return {
            "recipe": name, "effective_bits": effective_bits(plan, self.head_dim), "kl": kl.value,
            "kl_se": kl.standard_error, "top1_agreement": float(rows.agree.mean()), "ppl": rows.perplexity,
            "ppl_full": rows.perplexity_full, "recall": recall.value, "recall_se": recall.standard_error,
            "recall_full": share(self.recall_full).value, "recall_difference": difference.value,
            "recall_difference_low": difference.interval95[0], "recall_difference_high": difference.interval95[1],
            "n_tokens": kl.n, "n_recall": recall.n,
            "plan": [asdict(recipe) for recipe in (plan if len(set(plan)) > 1 else plan[:1])],
        }

    def searched_plans(self) -> dict[str, list[KVRecipe]]:
        """For every ladder and budget a plan per layer, found on the calibration text alone."""
        full = logits(self.model, self.calibration)

        def kl_of(plan: Sequence[KVRecipe | None]) -> float:
            with quantized(plan):
                return float(compare_logits(full, logits(self.model, self.calibration), self.calibration,
                                            self.device).kl.mean())

        plans = {}
        for name, ladder in LADDERS.items():
            found = sensitivities(ladder, self.layers, kl_of)
            for budget in BUDGETS:
                plans[f"{name}_{budget:g}"] = allocate(ladder, found, self.layers, self.head_dim, budget)
        return plans


def search(arguments: argparse.Namespace) -> None:
    bench = Bench(Path(arguments.model), arguments.device, arguments.tokens, arguments.recall, arguments.seed)
    plans: dict[str, list[KVRecipe]] = {name: [ALL[name]] * bench.layers for name in arguments.recipes or ALL}
    if arguments.layers:
        begin = time.monotonic()
        plans |= bench.searched_plans()
        _say(f"plans per layer found in {time.monotonic() - begin:.0f} s")
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    found = {"engine": "transformers", "device": _device_name(arguments.device), "dtype": "float32",
             "seed": arguments.seed, "torch": torch.__version__, "commit": collect_environment().git_sha, "rows": rows}
    for name, plan in plans.items():
        row = {"model": arguments.name, **bench.row(name, plan)}
        rows.append(row)
        _say(f"{arguments.name:14s} {name:34s} {row['effective_bits']:6.3f} KL {row['kl']:.4f} +- {row['kl_se']:.4f} "
             f"top-1 {row['top1_agreement']:.3f} ppl {row['ppl']:.2f} recall {row['recall']:.3f}")
        write_atomically(out, json.dumps(found, indent=1))  # every row, should the rest be cut off


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the checkpoint")
    parser.add_argument("--name", required=True, help="the model's name in the rows")
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of prose")
    parser.add_argument("--recall", type=int, default=512, help="recall prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="*", choices=sorted(ALL), help="only these")
    parser.add_argument("--layers", action="store_true", help="also search a plan per layer")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        search(_arguments())
    except UserError as error:
        sys.exit(f"kvtuner: {error}")
