"""Recall of codes: a list of things with 4-digit codes, some other text, then the code of one of the things.

Two bits pass perplexity and fail this: the answer is nowhere but in the KV cache.  The list fills the first hundred
tokens and the question stands behind as many again, so with pages of 64 no code is in the question's own page.
"""

import random

from kvtuner_sglang.quality.completion import CompletionItem

NAMES = (
    "anchor", "apple", "arrow", "badge", "basket", "bell", "blanket", "bottle", "bridge", "brush", "bucket", "button",
    "cabin", "camera", "candle", "carpet", "castle", "chair", "chimney", "clock", "coat", "coin", "compass", "copper",
    "cradle", "crown", "cup", "curtain", "desk", "diamond", "door", "drum", "engine", "feather", "fence", "flag",
    "flute", "forest", "fountain", "garden", "gate", "glove", "guitar", "hammer", "harbor", "hat", "helmet", "horn",
    "island", "jacket", "kettle", "key", "kite", "ladder", "lamp", "lantern", "leaf", "lemon", "letter", "lock",
    "mirror", "mountain", "needle", "notebook", "oven", "paddle", "paper", "pencil", "piano", "pillow", "pocket",
    "pot", "quilt", "ribbon", "ring", "river", "rocket", "rope", "saddle", "scissors", "shelf", "shield", "ship",
    "shoe", "spoon", "stone", "stove", "table", "teapot", "tent", "thimble", "ticket", "tower", "train", "trumpet",
    "tunnel", "umbrella", "vase", "violin", "wagon", "wallet", "well", "wheel", "whistle", "window",
)
FILLER = (
    "It was checked twice that morning.", "Nobody has asked for it since.", "It stands near the back wall.",
    "The clerk wrote it down in blue ink.", "It came with the last delivery.", "A copy is kept upstairs.",
)
THINGS = 12
FILLER_SENTENCES = 14


def recall_items(count: int, seed: int) -> list[CompletionItem]:
    """`count` different prompts of about 250 tokens; the same for the same seed."""
    rng = random.Random(f"recall-{seed}")
    return [_item(rng, f"recall-{seed}-{number:04d}") for number in range(count)]


def _item(rng: random.Random, item_id: str) -> CompletionItem:
    names = rng.sample(NAMES, THINGS)
    codes = [str(code) for code in rng.sample(range(1000, 10000), THINGS)]
    asked = rng.randrange(THINGS - 2)
    entries = [f"{name}: {code}" for name, code in zip(names, codes, strict=True)]
    filler = " ".join(rng.choice(FILLER) for _ in range(FILLER_SENTENCES))
    # The last two are repeated as they are, to show the form of an answer.
    lines = ["List of codes:", *entries, "", filler, "", "The same codes again:", *entries[:-3:-1], f"{names[asked]}:"]
    return CompletionItem(item_id, "\n".join(lines), codes[asked])
