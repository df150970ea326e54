"""Arithmetic word problems with exact whole-number answers, asked after eight solved ones.

The problems were generated once by reasoning-gym and are kept in data/arithmetic_problems.json, so that they are the
same whatever version is installed.  This makes the file again:

    python -m kvtuner_sglang.quality.arithmetic FILE
"""

import json
import random
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.quality.completion import CompletionItem

SHOTS = 8
PROBLEMS = 512
GENERATION_SEED = 20261122
LONGEST_QUESTION = 260  # characters: small models answer none of the long ones
MOST_LINES_OF_WORK = 2
LEGS = {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 9}


def arithmetic_items(count: int, seed: int) -> list[CompletionItem]:
    """`count` different prompts, the same for the same seed; raises UserError if the file has fewer problems."""
    text = resources.files("kvtuner_sglang.quality").joinpath("data", "arithmetic_problems.json").read_text("utf-8")
    problems = json.loads(text)["problems"]
    if count > len(problems) - SHOTS:
        raise UserError(f"there are {len(problems) - SHOTS} arithmetic problems: set quality.arithmetic_items to no "
                        "more.")
    random.Random(f"arithmetic-{seed}").shuffle(problems)
    intro = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in problems[:SHOTS])
    return [CompletionItem(f"arithmetic-{seed}-{number:04d}", f"{intro}Question: {question}\nAnswer:", answer)
            for number, (question, answer) in enumerate(problems[SHOTS : SHOTS + count])]


def generate() -> dict[str, Any]:
    """Half leg_counting, half short gsm_symbolic problems, all different; needs reasoning-gym 0.1.25."""
    legs, symbolic = _different("leg_counting", **LEGS), _different("gsm_symbolic")
    return {
        "source": "reasoning-gym 0.1.25 (Apache-2.0): leg_counting and gsm_symbolic, short problems only",
        "seed": GENERATION_SEED,
        "problems": [list(pair) for both in zip(legs, symbolic, strict=True) for pair in both],
    }


def _different(name: str, **settings: Any) -> list[tuple[str, str]]:
    import reasoning_gym

    found: dict[str, str] = {}
    for entry in reasoning_gym.create_dataset(name, seed=GENERATION_SEED, size=PROBLEMS * 60, **settings):
        question = re.sub(r"\s+", " ", entry["question"]).strip()
        question = question.replace("Your task is to count how many legs there are in total when given a list of "
                                    "animals. Now, how", "How")
        question = question.replace(" Give the result as your final answer. Do not include units.", "")
        if _fits(question, entry):
            found.setdefault(question, entry["answer"])
        if len(found) == PROBLEMS // 2:
            break
    return list(found.items())


def _fits(question: str, entry: dict[str, Any]) -> bool:
    work = entry["metadata"].get("answer_cot", "").count("\n")
    return bool(re.fullmatch(r"\d{1,4}", entry["answer"])) and len(question) <= LONGEST_QUESTION \
        and work <= MOST_LINES_OF_WORK


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    Path(sys.argv[1]).write_text(json.dumps(generate(), indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
