"""The independent path: the same formats in transformers, with visibility as a mask instead of pages and tails.

Attention is computed over [stored | full] keys and values, stored being what fake quantization reads back.  A query
at position t sees, for keys per channel, stored positions before its own page and full ones of its own page up to t;
for per-token keys, stored positions up to t.  Nothing of the engine's code is used but the quantizer
and its measure of channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface

from kvtuner_sglang.errors import ConfigError
from kvtuner_sglang.quality.recipe import KVRecipe, fake_quantize
from kvtuner_triton.reference import score_weights

ATTENTION = "kvtuner_quality"
QUERIES_AT_ONCE = 512
Plan = Sequence[KVRecipe | None]


@dataclass(frozen=True)
class KeyStatistics:
    """Of the keys of one layer after rotary embedding, over tokens: (kv_heads, 1, head_dim) fp32 each."""

    mean: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


@dataclass
class _State:
    """What attention layers look up while a model runs; None at a layer is full precision."""

    plan: Plan = ()
    statistics: Sequence[KeyStatistics] = ()
    recorded: dict[int, KeyStatistics] | None = None
    errors: dict[int, float] | None = field(default=None)


_state = _State()


def load_model(path: Path | str, dtype: torch.dtype, device: str) -> Any:
    """A causal language model whose attention is this file's."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION)
    return model.to(device).eval()


def load_tokenizer(path: Path | str) -> Any:
    return AutoTokenizer.from_pretrained(path)


@contextmanager
def quantized(plan: Plan, statistics: Sequence[KeyStatistics] = ()) -> Iterator[None]:
    """Models run inside with layer i's keys and values stored by plan[i]; conditioned keys need `statistics`."""
    if any(r is not None and r.conditioned for r in plan) and len(statistics) != len(plan):
        raise ConfigError("key_mean and key_scale need calibration: pass the result of key_statistics.")
    before = (_state.plan, _state.statistics)
    _state.plan, _state.statistics = plan, statistics
    try:
        yield
    finally:
        _state.plan, _state.statistics = before


@torch.inference_mode()
def logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """(len(tokens), vocabulary) fp32 on the model's device."""
    ids = torch.tensor([list(tokens)], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0].float()


@torch.inference_mode()
def layer_inputs(model: Any, ids: torch.Tensor, first: int = 0,
                 hidden: torch.Tensor | None = None) -> list[torch.Tensor]:
    """What enters layer `first` and those after it, and what leaves the last: (batch, tokens, hidden_size) each.

    ids: (batch, tokens).  hidden: what enters layer `first`, unless that is 0.
    """
    body = model.model
    states = [body.embed_tokens(ids) if hidden is None else hidden]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    embeddings = body.rotary_emb(states[0], positions)
    for layer in body.layers[first:]:
        states.append(layer(states[-1], attention_mask=None, position_ids=positions, position_embeddings=embeddings,
                            use_cache=False))
    return states


@torch.inference_mode()
def head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (rows, vocabulary) fp32 of what leaves the last layer, (rows, hidden_size)."""
    return model.lm_head(model.model.norm(hidden)).float()


@torch.inference_mode()
def key_statistics(model: Any, tokens: Sequence[int]) -> list[KeyStatistics]:
    """Each layer's keys over a calibration text, in full precision."""
    _state.recorded = {}
    try:
        with quantized(()):
            logits(model, tokens)
        return [_state.recorded[i] for i in range(len(_state.recorded))]
    finally:
        _state.recorded = None


@torch.inference_mode()
def attention_errors(model: Any, tokens: Sequence[int], plan: Plan) -> dict[int, float]:
    """Layer -> relative squared error of its attention output under `plan`, every layer fed full-precision input."""
    _state.errors = {}
    try:
        with quantized(plan):
            logits(model, tokens)
        return _state.errors
    finally:
        _state.errors = None


@torch.inference_mode()
def answers_greedily(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
                     batch: int) -> list[bool]:
    """Whether greedy decoding of each prompt would give exactly its answer's tokens.

    Teacher-forced: all answer positions of one prefill must put the answer's token first. By the visibility rule
    that is the same as decoding.  Prompts are padded on the right, which no earlier query can see.
    """
    right: list[bool] = []
    for low in range(0, len(prompts), batch):
        rows = [[*p, *a] for p, a in zip(prompts[low : low + batch], answers[low : low + batch], strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows], device=model.device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for i, (prompt, answer) in enumerate(zip(prompts[low : low + batch], answers[low : low + batch], strict=True)):
            first = len(prompt) - 1
            best = model.lm_head(hidden[i, first : first + len(answer)]).argmax(-1)
            right.append(best.tolist() == list(answer))
    return right


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The attention below masks by position itself."""
    return None


def _attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: torch.Tensor | None,
               scaling: float | None = None, **_: Any) -> tuple[torch.Tensor, None]:
    """query: (batch, q_heads, tokens, head_dim), key, value: (batch, kv_heads, tokens, head_dim)."""
    index = module.layer_idx
    recipe = _state.plan[index] if _state.plan else None
    if _state.recorded is not None:
        low, high = key.float().transpose(1, 2).flatten(0, 1).aminmax(dim=0)
        mean = key.float().mean((0, 2))
        _state.recorded[index] = KeyStatistics(mean[:, None], low[:, None], high[:, None])
    out = _attend(recipe, index, query, key, value, scaling)
    if _state.errors is not None:
        exact = _attend(None, index, query, key, value, scaling)
        _state.errors[index] = float((out - exact).float().square().sum() / exact.float().square().sum())
        out = exact
    return out.transpose(1, 2).contiguous(), None


def _attend(recipe: KVRecipe | None, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            scaling: float | None) -> torch.Tensor:
    stored_key, stored_value = key, value
    if recipe is not None:
        if recipe.conditioned:
            query, key = _condition(recipe, _state.statistics[index], query, key)
        weight = _weights(recipe, query, key.shape[1]) if recipe.key.boost else None
        stored_key, stored_value = fake_quantize(recipe.key, key, weight), fake_quantize(recipe.value, value)
    page = recipe.page if recipe is not None else None
    repeats = query.shape[1] // key.shape[1]
    stored_key, stored_value, key, value = (
        x.repeat_interleave(repeats, 1) for x in (stored_key, stored_value, key, value)
    )
    out = torch.empty_like(query)
    step = QUERIES_AT_ONCE // page * page if page else QUERIES_AT_ONCE
    for low in range(0, query.shape[2], step):
        high = min(low + step, query.shape[2])
        own = slice(low, high)
        keys, values = stored_key[:, :, :high], stored_value[:, :, :high]
        mask = _sees(low, high, page, query.device)
        if page:
            keys = torch.cat([keys, key[:, :, own]], 2)
            values = torch.cat([values, value[:, :, own]], 2)
        out[:, :, own] = scaled_dot_product_attention(query[:, :, own], keys, values, attn_mask=mask, scale=scaling)
    return out


def _weights(recipe: KVRecipe, query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Of the queries at the last position of every whole page: (batch, kv_heads, pages, head_dim)."""
    page = recipe.page
    if page is None:
        raise ConfigError("keys per channel need a page: give group, the tokens of a page.")
    return score_weights(query[:, :, page - 1 :: page].transpose(1, 2), kv_heads).transpose(1, 2)


def _sees(low: int, high: int, page: int | None, device: torch.device) -> torch.Tensor:
    """(queries low..high-1, stored 0..high-1 [+ full low..high-1]) bool; low is a page boundary."""
    position = torch.arange(low, high, device=device)[:, None]
    stored, full = torch.arange(high, device=device), torch.arange(low, high, device=device)
    if page is None:
        return stored <= position
    first = position // page * page
    return torch.cat([stored < first, (full >= first) & (full <= position)], 1)


def _condition(recipe: KVRecipe, statistics: KeyStatistics, query: torch.Tensor,
               key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys shifted and scaled so that q.k changes by nothing that softmax sees."""
    if recipe.key_mean:
        key = key - statistics.mean.to(key)
    if recipe.key_scale != "none":
        scale = (statistics.high - statistics.low).clamp_min(1e-6)
        scale = scale / scale.mean(-1, keepdim=True)
        if recipe.key_scale == "sqrt":
            scale = scale.sqrt()
        repeats = query.shape[1] // key.shape[1]
        key, query = key / scale.to(key), query * scale.repeat_interleave(repeats, 0).to(query)
    return query, key
