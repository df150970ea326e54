"""The report in one language: phrases that its layout asks for, and how the record's own sentences are said in it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvtuner_sglang.report import text_en, text_zh

STATUSES = {"ok": "status_ok", "failed": "status_failed", "invalid": "status_invalid", "oom": "status_oom"}


@dataclass(frozen=True)
class Text:
    """phrases: what text_en.TEXT names.  sentences: regular expressions of what records say in English -> the same in
    this language, with {} for each group; None where records are read as they are."""

    phrases: Mapping[str, str]
    sentences: Mapping[str, str] | None = None

    def __getitem__(self, key: str) -> str:
        return self.phrases[key]

    def status(self, status: str) -> str:
        """A record's status as a word."""
        return self[STATUSES[status]]

    def said(self, sentence: str) -> str:
        """A sentence of a record in this language; what no expression knows is quoted as it is, between backquotes."""
        if self.sentences is None:
            return sentence
        known = self._known(sentence)
        return f"`{sentence}`" if known is None else known

    def _known(self, sentence: str) -> str | None:
        for pattern, here in (self.sentences or {}).items():
            if found := re.fullmatch(pattern, sentence):
                return here.format(*(self._part(part or "") for part in found.groups()))
        return None

    def _part(self, part: str) -> str:
        known = self._known(part)
        return part if known is None else known


TEXTS = {"en": Text(text_en.TEXT), "zh": Text(text_zh.TEXT, text_zh.SENTENCES)}
