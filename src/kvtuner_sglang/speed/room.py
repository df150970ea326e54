"""How many requests the pool holds, and what is in its prefix cache."""

from dataclasses import dataclass


def request_tokens(context: int, outputs: int, page_size: int) -> int:
    """Tokens that one request takes, whole pages, with all answers that it leaves behind and a page to spare."""
    pages = -(-(context + outputs) // page_size) + 1
    return pages * page_size


@dataclass
class Room:
    """Counts an upper bound of what the prefix cache holds, so that it is flushed before it must evict a prompt."""

    tokens: int
    page_size: int
    outputs: int
    context: int = 0
    prompts: int = 0
    used: int = 0

    def most(self, context: int) -> int:
        """Requests of `context` tokens that fit an empty pool."""
        return self.tokens // request_tokens(context, self.outputs, self.page_size)

    def enter(self, batch: int, context: int) -> bool:
        """Take room for a cell of `batch` <= most(context) requests; whether the cache must be flushed for it."""
        whole = request_tokens(context, self.outputs, self.page_size)
        answers = request_tokens(0, self.outputs, self.page_size)
        known = min(self.prompts, batch) if context == self.context else 0
        needed = known * answers + (batch - known) * whole
        flush = context != self.context or self.used + needed > self.tokens
        if flush:
            self.context, self.prompts, self.used, needed = context, 0, 0, batch * whole
        self.prompts = max(self.prompts, batch)
        self.used += needed
        return flush
