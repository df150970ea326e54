"""One format of one model against the same engine in full precision, on the same prompts."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from kvtuner_sglang.config import DistConfig, QuantConfig
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.plugin.attention_choice import Attention
from kvtuner_sglang.plugin.options import keywords_of
from kvtuner_sglang.quality.arithmetic import arithmetic_items
from kvtuner_sglang.quality.compare import TokenRows
from kvtuner_sglang.quality.completion import CompletionItem, share_right
from kvtuner_sglang.quality.config import QualityConfig
from kvtuner_sglang.quality.engine_process import run_engine
from kvtuner_sglang.quality.engine_spec import EngineResult, EngineSpec, Questions
from kvtuner_sglang.quality.prose import prose_windows
from kvtuner_sglang.quality.recall import recall_items
from kvtuner_sglang.serving.cache_folder import one_at_a_time
from kvtuner_sglang.serving.ports import choose_ports

Say = Callable[[str], None]
ONE_HOST = DistConfig(name="single", tp=1, pp=1, nnodes=1, launcher="local", hosts=("127.0.0.1",), http_ports=(0,),
                      dist_port=0, interface="lo")


@dataclass(frozen=True)
class Subject:
    """The model and where it runs; `dtype` is what both engines compute in, "float32", "bfloat16" or "float16"."""

    model_path: Path
    model_sha256: str
    device: str
    dtype: str
    attention: Attention = "auto"


@dataclass(frozen=True)
class Prompts:
    """What every format of a comparison is asked: prose windows and, by name, items and their token ids."""

    windows: list[list[int]]
    items: dict[str, list[CompletionItem]]
    questions: dict[str, Questions]


@dataclass(frozen=True)
class Quality:
    """What was measured. `right`, `right_full`: by name, item by item. `texts`: what the quantized engine answered."""

    rows: list[TokenRows]
    prompts: Prompts
    right: dict[str, list[bool]]
    right_full: dict[str, list[bool]]
    texts: dict[str, list[str]]
    kvtuner: dict[str, Any]
    seconds: dict[str, float]
    spec: EngineSpec


def build_prompts(model_path: Path, config: QualityConfig, seed: int) -> Prompts:
    """The same for every format, device and precision of a model; raises UserError if the prose is too short."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    items: dict[str, list[CompletionItem]] = {}
    if config.recall_items:
        items["recall"] = recall_items(config.recall_items, seed)
    if config.arithmetic_items:
        items["arithmetic"] = arithmetic_items(config.arithmetic_items, seed)
    questions = {name: _questions(tokenizer, some) for name, some in items.items()}
    return Prompts(prose_windows(tokenizer, config.prose_tokens, config.window_tokens), items, questions)


def _questions(tokenizer: Any, items: list[CompletionItem]) -> Questions:
    prompts = [tokenizer.encode(item.prompt, add_special_tokens=False) for item in items]
    whole = [tokenizer.encode(f"{item.prompt} {item.answer}", add_special_tokens=False) for item in items]
    for prompt, both in zip(prompts, whole, strict=True):
        if both[: len(prompt)] != prompt:
            raise UserError("this tokenizer joins a prompt and its answer into one token: recall and arithmetic cannot "
                            "be judged, so set quality.recall_items=0 quality.arithmetic_items=0.")
    return Questions(prompts, [both[len(prompt):] for prompt, both in zip(prompts, whole, strict=True)])


def plugin_keywords(quant: QuantConfig, kv_gib: float, kv_noise: float = 0.0,
                    attention: Attention = "auto") -> dict[str, Any]:
    """`sglang.Engine` keywords that serve `quant`; only those that differ from the plugin's defaults."""
    return keywords_of(quant.options(), kvtuner_kv_gib=kv_gib, kvtuner_kv_noise=kv_noise, kvtuner_attention=attention)


def engine_spec(subject: Subject, prompts: Prompts, config: QualityConfig, plugin: dict[str, Any], seed: int,
                chunked_prefill_tokens: int) -> EngineSpec:
    """What to ask an engine, without its folders."""
    return EngineSpec(
        model_path=str(subject.model_path), device=subject.device, dtype=subject.dtype, plugin=plugin, page_size=None,
        context_length=config.context_length, max_running_requests=config.batch,
        chunked_prefill_tokens=chunked_prefill_tokens, seed=seed, windows=prompts.windows,
        questions=prompts.questions, out_dir="", reference_dir=None, port=0,
    )


def reference_key(spec: EngineSpec, model_sha256: str) -> str:
    """Sixteen hex digits over all that the full-precision result depends on."""
    tree = asdict(spec)
    for name in ("model_path", "out_dir", "reference_dir", "port", "page_size"):
        del tree[name]
    tree |= {"model": model_sha256, "sglang": version("sglang"), "torch": version("torch")}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def full_precision(spec: EngineSpec, model_sha256: str, cache_dir: Path, timeout_s: float, log_path: Path,
                   say: Say) -> tuple[Path, EngineResult]:
    """Folder of the full-precision engine's logits, and its answers; measured once, then read from `cache_dir`."""
    folder = cache_dir / reference_key(spec, model_sha256)
    with one_at_a_time(folder.with_suffix(".lock"), lambda: say("full precision: another run measures it; waiting")):
        if (folder / "result.json").is_file():
            say(f"full precision: from {folder}")
            return folder, EngineResult.read(folder / "result.json")
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_dir))
        try:
            say("full precision: starting an engine")
            result = run_engine(replace(spec, out_dir=str(draft), port=_free_port()), timeout_s, log_path,
                                lambda line: say(f"full precision: {line}"))
            shutil.rmtree(draft / "passes", ignore_errors=True)
            draft.replace(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder, result


def measure(subject: Subject, quant: QuantConfig, config: QualityConfig, *, seed: int, chunked_prefill_tokens: int,
            work_dir: Path, cache_dir: Path, say: Say, kv_noise: float = 0.0) -> Quality:
    """Both engines, one after the other; raises UserError if one fails or its figures cannot count.

    quant=bf16 is measured too: a second full-precision engine against the first shows what repeats.
    """
    prompts = build_prompts(subject.model_path, config, seed)
    plain = engine_spec(subject, prompts, config, {"kvtuner_kv_gib": config.kv_gib}, seed, chunked_prefill_tokens)
    reference_dir, reference = full_precision(plain, subject.model_sha256, cache_dir, config.timeout_s,
                                              work_dir / "full_precision.log", say)
    keywords = plugin_keywords(quant, config.kv_gib, kv_noise, subject.attention)
    spec = replace(plain, plugin=keywords, page_size=quant.page_size,
                   out_dir=str(work_dir), reference_dir=str(reference_dir), port=_free_port())
    say(f"{quant.name}: starting an engine")
    result = run_engine(spec, config.timeout_s, work_dir / "quantized.log", lambda line: say(f"{quant.name}: {line}"))
    shutil.rmtree(work_dir / "passes", ignore_errors=True)
    rows = [TokenRows(**{name: np.array(column, dtype=np.float64) for name, column in row.items()})
            for row in result.rows]
    right, right_full = ({name: share_right(items, r.texts[name]) for name, items in prompts.items.items()}
                         for r in (result, reference))
    return Quality(rows, prompts, right, right_full, result.texts, result.kvtuner, result.seconds, spec)


def _free_port() -> int:
    return choose_ports(ONE_HOST).http[0]
