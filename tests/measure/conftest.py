"""Samples as a right server answers them; each test changes what it is about."""

from collections.abc import Callable
from typing import Any

import pytest

from kvtuner_sglang.serving.client import Sample


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """make_sample(**changed fields): 10 tokens in, 3 out, sent at 1.0 s, tokens at 1.2, 1.3, 1.5 s, ended at 1.6 s."""

    def make(**changed: Any) -> Sample:
        fields: dict[str, Any] = {
            "request_id": "ttft-7", "kind": "ttft", "prompt_tokens_sent": 10, "output_tokens_asked": 3,
            "started_unix": 0.0, "sent_s": 1.0, "ended_s": 1.6, "http_status": 200, "prompt_tokens": 10,
            "output_tokens": 3, "cached_tokens": 0, "text": "abc", "output_ids": [1, 2, 3],
            "token_times_s": (1.2, 1.3, 1.5), "finish_reason": "length", "error": None,
        }
        return Sample(**{**fields, **changed})

    return make
