"""Arithmetic word problems of reasoning-gym with exact whole-number answers, asked after eight solved ones."""

import re
from functools import cache
from typing import Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.quality.completion import CompletionItem

SHOTS = 8
ANSWER_TOKENS = 8
LONGEST_QUESTION = 260  # characters: small models answer none of the long ones
MOST_LINES_OF_WORK = 2
LEGS = {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 5}


def arithmetic_items(count: int, seed: int) -> list[CompletionItem]:
    """`count` prompts, half leg_counting and half short gsm_symbolic problems; the same for the same seed.

    Raises UserError if reasoning-gym is not installed.
    """
    solved = _problems(SHOTS, seed=10_000 + seed)
    intro = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in solved)
    asked = [problem for problem in _problems(count + SHOTS, seed=seed) if problem not in solved][:count]
    return [CompletionItem(f"arithmetic-{seed}-{number:04d}", f"{intro}Question: {question}\nAnswer:", answer)
            for number, (question, answer) in enumerate(asked)]


@cache
def _problems(count: int, seed: int) -> list[tuple[str, str]]:
    """Question and answer, taken in turn from the two generators."""
    legs = _different("leg_counting", count, seed, **LEGS)
    symbolic = _different("gsm_symbolic", count, seed)
    return [(legs if number % 2 else symbolic)[number // 2] for number in range(count)]


def _different(name: str, count: int, seed: int, **settings: Any) -> list[tuple[str, str]]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError("the arithmetic problems need reasoning-gym: pip install reasoning-gym==0.1.25, or set "
                        "quality.arithmetic_items=0.") from error
    found: dict[str, str] = {}
    for entry in reasoning_gym.create_dataset(name, seed=seed, size=count * 60, **settings):
        question = re.sub(r"\s+", " ", entry["question"]).strip()
        question = question.replace("Your task is to count how many legs there are in total when given a list of "
                                    "animals. Now, how", "How")
        question = question.replace(" Give the result as your final answer. Do not include units.", "")
        if _fits(question, entry):
            found.setdefault(question, entry["answer"])
        if len(found) > count // 2:
            return list(found.items())
    raise UserError(f"reasoning-gym's {name} made only {len(found)} different short problems: "
                    f"set quality.arithmetic_items={2 * len(found) - SHOTS} or less.")


def _fits(question: str, entry: dict[str, Any]) -> bool:
    work = entry["metadata"].get("answer_cot", "").count("\n")
    return bool(re.fullmatch(r"\d{1,4}", entry["answer"])) and len(question) <= LONGEST_QUESTION \
        and work <= MOST_LINES_OF_WORK
