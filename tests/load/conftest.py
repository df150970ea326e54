"""Workloads as conf/ gives them, and samples as a right server answers them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.serving.client import Sample

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="session")
def load_config() -> Callable[..., RunConfig]:
    """load_config("workload=open", ...) -> the checked configuration."""
    return lambda *overrides: command_line.load(overrides, CONF)


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """make_sample(**changed fields): sent at 1.0 s, tokens at 1.2, 1.3 and 1.5 s, ended at 1.6 s."""

    def make(**changed: Any) -> Sample:
        fields: dict[str, Any] = {
            "request_id": "closed_c1_r0-7", "kind": "closed_c1_r0", "prompt_tokens_sent": 10, "output_tokens_asked": 3,
            "started_unix": 0.0, "sent_s": 1.0, "ended_s": 1.6, "http_status": 200, "prompt_tokens": 10,
            "output_tokens": 3, "cached_tokens": 0, "text": "abc", "output_ids": [1, 2, 3],
            "token_times_s": (1.2, 1.3, 1.5), "finish_reason": "length", "retractions": 0,
        }
        return Sample(**{**fields, **changed})

    return make
