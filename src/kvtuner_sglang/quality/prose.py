"""Prose of known source, cut into windows of token ids.  `data/README.md` says where it is from."""

import hashlib
from importlib import resources
from typing import Any

from kvtuner_sglang.errors import UserError

MEASURED = "persuasion_chapters_3_4.txt"
CALIBRATION = "persuasion_chapter_1.txt"
SHA256 = {
    MEASURED: "e03228f88f057bfbce4989f0ed51ccb70a3363617c629cb9af0816ab8c3aba5e",
    CALIBRATION: "1feec77433a82bbad13e85f9f10f397612fd971af3dd55e7f07c5eb19ae69b60",
}


def prose_text(name: str = MEASURED) -> str:
    """The excerpt; raises UserError if the file is not the one that results are quoted for."""
    data = resources.files("kvtuner_sglang.quality").joinpath("data", name).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise UserError(f"{name} was changed: restore it from the repository, or figures cannot be compared.")
    return data.decode("utf-8")


def prose_windows(tokenizer: Any, tokens: int, window_tokens: int, name: str = MEASURED,
                  option: str = "quality.prose_tokens") -> list[list[int]]:
    """Consecutive windows of token ids that hold `tokens` in all; the last may be shorter.

    Raises UserError, which names `option` as what to lower, if the excerpt has fewer tokens under this tokenizer.
    """
    ids = tokenizer.encode(prose_text(name), add_special_tokens=False)
    if len(ids) < tokens:
        raise UserError(f"{name} has {len(ids)} tokens with this tokenizer, fewer than the {tokens} asked for: "
                        f"set {option}={len(ids) // 100 * 100} or less.")
    return [ids[low : min(low + window_tokens, tokens)] for low in range(0, tokens, window_tokens)]
