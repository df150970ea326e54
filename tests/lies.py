"""Lies of /server_info and of our own client, for every kind of workload; those of answers are lying_server.py's."""

import asyncio
from typing import Any

import pytest

from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.serving import client


def another_plan(info: dict[str, Any]) -> None:
    for part in (info["kvtuner"], *info["kvtuner"]["ranks"]):
        part["plan_hash"] = "0" * 12


def another_model(info: dict[str, Any]) -> None:
    info["model_path"] = "/models/another"


def plain_sglang(info: dict[str, Any]) -> None:
    del info["kvtuner"]


def sixteen_bit_pool(info: dict[str, Any]) -> None:
    info["kvtuner"]["ranks"][0]["pool_class"] = "MHATokenToKVPool"


def quantization_off(info: dict[str, Any]) -> None:
    info["kvtuner"]["enabled"] = False


def repeated_prompts(patch: pytest.MonkeyPatch) -> None:
    """As a generator does that starts anew from its seed."""
    patch.setattr(PromptSource, "take", lambda self, count, tokens: [[300] + [301] * (tokens - 1)] * count)


def slow_client(patch: pytest.MonkeyPatch) -> None:
    """In a closed loop between an answer and the worker's next request, in an open one before every request."""
    honest = client.send

    async def dawdle(session: Any, base_url: str, request: client.Request, *words: Any) -> client.Sample:
        await asyncio.sleep(1.5 if request.kind.startswith("open") else 0.0)
        sample = await honest(session, base_url, request, *words)
        await asyncio.sleep(0.6 if request.kind.startswith(("throughput", "closed")) else 0.0)
        return sample

    patch.setattr(client, "send", dawdle)
