"""Prompts of exactly so many tokens, no two of which share a prefix.

Sent as `input_ids`, so no tokenizer can change their length.  SGLang's own "random-ids" prompts are runs of consecutive
ids that repeat with the seed: a second call then meets a warm prefix cache, which fakes the time to first token.
"""

import random

from kvtuner_sglang.errors import UserError

RESERVED_IDS = 256  # special tokens and raw bytes are usually the first ids ...
RESERVED_SHARE = 0.1  # ... or the last


class PromptSource:
    """Draws prompts from a seed; every prompt's first token is one that no earlier prompt of this source began with."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        last = int(vocab_size * (1 - RESERVED_SHARE))
        if last - RESERVED_IDS < RESERVED_IDS:
            raise UserError(f"a vocabulary of {vocab_size} tokens is too small for unique prompts: "
                            "use a model with at least 1000.")
        self._ids = range(RESERVED_IDS, last)
        self._random = random.Random(seed)
        self._first_ids = self._random.sample(self._ids, len(self._ids))

    def take(self, count: int, tokens: int) -> list[list[int]]:
        """`count` new prompts of `tokens` token ids each."""
        if count > len(self._first_ids):
            raise UserError(f"{count} more unique prompts do not fit this vocabulary: ask for fewer requests.")
        return [[self._first_ids.pop(), *self._random.choices(self._ids, k=tokens - 1)] for _ in range(count)]
