"""One prompt with one right answer, compared exactly with what greedy decoding would write."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# What a model may write between the prompt and its number.
_NUMBER = re.compile(r"\s*\$?(-?\d[\d,]*)(?!\d)")


@dataclass(frozen=True)
class CompletionItem:
    """`prompt` ends right before the answer; `answer` is a number as digits; `item_id` is stable for a seed."""

    item_id: str
    prompt: str
    answer: str

    def is_right(self, text: str) -> bool:
        """Whether the completion begins with exactly this number: no other digit may stand before or behind it."""
        match = _NUMBER.match(text)
        return match is not None and match.group(1).replace(",", "") == self.answer


def share_right(items: Sequence[CompletionItem], texts: Sequence[str]) -> list[bool]:
    """Item by item, whether its completion is right; lengths must agree."""
    return [item.is_right(text) for item, text in zip(items, texts, strict=True)]
