"""The prompts: right answers in them, the same for a seed, and an exact judge."""

import json
import re
from importlib import resources

import pytest

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.quality import arithmetic, prose
from kvtuner_sglang.quality.arithmetic import arithmetic_items
from kvtuner_sglang.quality.completion import CompletionItem, share_right
from kvtuner_sglang.quality.recall import recall_items


class Letters:
    """One token a character."""

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        return [ord(c) for c in text]


@pytest.mark.parametrize("name", [prose.MEASURED, prose.CALIBRATION])
def test_prose_is_the_excerpt_that_figures_are_quoted_for(name):
    text = prose.prose_text(name)
    assert len(text) > 15_000
    assert text.startswith("Chapter")
    assert name in (resources.files("kvtuner_sglang.quality") / "data" / "README.md").read_text()
    assert prose.SHA256[name] in (resources.files("kvtuner_sglang.quality") / "data" / "README.md").read_text()


def test_measured_and_calibration_text_do_not_overlap():
    measured, calibration = (set(prose.prose_text(n).splitlines()) for n in (prose.MEASURED, prose.CALIBRATION))
    assert {line for line in measured & calibration if len(line) > 30} == set()


def test_changed_prose_is_refused(monkeypatch):
    monkeypatch.setitem(prose.SHA256, prose.MEASURED, "0" * 64)
    with pytest.raises(UserError, match="was changed"):
        prose.prose_text()


def test_windows_are_consecutive_and_of_the_length_asked_for():
    windows = prose.prose_windows(Letters(), 1050, 500)
    assert [len(w) for w in windows] == [500, 500, 50]
    assert "".join(chr(t) for w in windows for t in w) == prose.prose_text()[:1050]
    with pytest.raises(UserError, match="fewer than the 999999"):
        prose.prose_windows(Letters(), 999_999, 2000)


def test_recall_asks_for_a_code_of_the_list_that_stands_far_back():
    items = recall_items(200, seed=3)
    assert len({item.prompt for item in items}) == 200
    for item in items:
        name = item.prompt.rsplit("\n", 1)[1].rstrip(":")
        listed, asked = item.prompt.split("The same codes again:")
        assert re.findall(rf"^{name}: (\d+)$", listed, re.M) == [item.answer]
        assert re.fullmatch(r"\d{4}", item.answer)
        assert item.answer not in asked
        assert len(listed) - listed.index(item.answer) > 300


def test_recall_is_the_same_for_a_seed_and_another_for_another():
    assert recall_items(20, 3) == recall_items(30, 3)[:20]
    assert recall_items(20, 3) != recall_items(20, 4)


def test_arithmetic_is_exact_different_and_the_same_for_a_seed():
    items = arithmetic_items(40, seed=0)
    assert len({item.prompt for item in items}) == 40
    assert all(re.fullmatch(r"\d{1,4}", item.answer) for item in items)
    assert items == arithmetic_items(40, seed=0)
    intro, asked = items[0].prompt.rsplit("Question:", 1)
    assert intro.count("Answer:") == 8
    assert asked not in intro
    with pytest.raises(UserError, match="504"):
        arithmetic_items(505, seed=0)


def test_arithmetic_problems_are_those_that_reasoning_gym_makes():
    stored = json.loads((resources.files("kvtuner_sglang.quality") / "data" / "arithmetic_problems.json").read_text())
    assert stored == arithmetic.generate()
    assert len({question for question, _ in stored["problems"]}) == 512


@pytest.mark.parametrize(("text", "right"), [
    (" 4831", True), ("4831\nring: 1", True), (" 4831.", True), (" $4831", True), (" 4,831 legs", True),
    (" 48312", False), (" 483", False), (" 14831", False), (" -4831", False), (" the 4831", False), ("", False),
    (" 4813", False),
])
def test_the_judge_is_exact(text, right):
    assert CompletionItem("x", "p", "4831").is_right(text) is right


def test_every_item_needs_a_completion():
    with pytest.raises(ValueError, match="shorter"):
        share_right(recall_items(2, 0), ["1"])
