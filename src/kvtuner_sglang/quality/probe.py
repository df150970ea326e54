"""Before a model and plan are first served: compare full and quantized logits on a few tokens, and refuse a collapse.

Runs in the transformers path on the device that will serve, in a process of its own, whose memory is free again when
the server starts.  The verdict is cached by the checkpoint's sha256 and the plan, so it costs its time once.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.quality.compare import compare_logits
from kvtuner_sglang.quality.prose import prose_windows
from kvtuner_sglang.quality.recipe import KVRecipe, recipe_of
from kvtuner_sglang.quality.transformers_path import (
    attention_errors,
    load_model,
    load_tokenizer,
    logits,
    quantized,
)
from kvtuner_sglang.quant import KVFormat, format_hash

WORST_LAYERS = 3
EXIT_S = 10.0  # for a process that has answered to end by itself
PROBE_VERSION = 3  # part of the cache key: raise it when text, method or quantizer change


@dataclass(frozen=True)
class ProbeResult:
    """kl: mean nats over the `tokens` whose queries read stored pages; worst_layers: layer and KL with this layer alone
    quantized, worst first."""

    kl: float
    top1_agreement: float
    tokens: int
    worst_layers: tuple[tuple[int, float], ...]

    def refusal(self, model: str, plan_name: str, bound: float) -> str:
        """The sentence for a result above the bound."""
        return (f"{model} with quant={plan_name} is refused: its logit KL of {self.kl:.3f} is over the bound {bound:g} "
                f"on {self.tokens} tokens; {self._worst()}; use more bits or keys per channel (quant=kv4, kv8, bf16), "
                "or raise quality.probe_bound.")

    def passed(self, model: str, plan_name: str, bound: float) -> str:
        """The sentence for a result within the bound."""
        return (f"{model} with quant={plan_name} passes: its logit KL of {self.kl:.4f} is within the bound {bound:g} "
                f"on {self.tokens} tokens, of which {100 * self.top1_agreement:.1f}% keep their first choice; "
                f"{self._worst()}.")

    def _worst(self) -> str:
        return "worst layers by KL alone: " + ", ".join(f"{layer} ({kl:.2g})" for layer, kl in self.worst_layers)


def probe_file(cache_dir: Path, model_sha256: str, plan: Sequence[KVFormat], page_size: int, tokens: int, device: str,
               dtype: torch.dtype) -> Path:
    """Where the verdict on this checkpoint, plan and precision is kept."""
    precision = f"{device}-{str(dtype).removeprefix('torch.')}"
    name = f"v{PROBE_VERSION}-{model_sha256[:16]}-{format_hash(plan)}-page{page_size}-{tokens}-{precision}.json"
    return cache_dir / name


def probe(model_path: Path, plan: Sequence[KVFormat], page_size: int, tokens: int, device: str,
          dtype: torch.dtype) -> ProbeResult:
    """Measure without a cache; loads the model, runs it twice and, layer by layer, a few times more."""
    window = prose_windows(load_tokenizer(model_path), tokens, tokens)[0]
    model = load_model(model_path, dtype, device)
    recipes = [recipe_of(fmt, page_size) for fmt in plan]
    full = logits(model, window)

    def kl_and_agreement(some: Sequence[KVRecipe | None]) -> tuple[float, float]:
        with quantized(some):
            rows = compare_logits(full, logits(model, window), window, device)
        # Before the second page nothing is read as stored, which would only dilute the mean.
        return float(rows.kl[page_size:].mean()), float(rows.agree[page_size:].mean())

    kl, agreement = kl_and_agreement(recipes)
    errors = attention_errors(model, window, recipes)
    # One layer at a time is exact but slow, so it is done for those whose attention output suffers most.
    suspects = sorted(errors, key=lambda layer: -errors[layer])[:WORST_LAYERS]
    alone = {layer: kl_and_agreement([r if i == layer else None for i, r in enumerate(recipes)])[0]
             for layer in suspects}
    worst = tuple(sorted(alone.items(), key=lambda item: -item[1]))
    return ProbeResult(kl, agreement, len(window) - page_size, worst)


def probe_in_own_process(*arguments: Any) -> ProbeResult:
    """`probe(*arguments)`, and its memory given back; raises UserError if it does not fit or its process dies.

    The process is gone when this returns or is interrupted.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_probe, args=(sender, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
        process.join(EXIT_S)
    except EOFError as error:
        raise UserError("the probe's process died, see above: mend that, or set quality.probe=false.") from error
    finally:
        process.kill()
        process.join()
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


def _send_probe(sender: Connection, *arguments: Any) -> None:
    try:
        sender.send(probe(*arguments))
    except UserError as error:
        sender.send(str(error))
    except torch.OutOfMemoryError:
        sender.send("the whole model does not fit this GPU beside what runs there, so it cannot be probed: free "
                    "memory, or set quality.probe=false.")


def ensure_probed(*, model_name: str, model_path: Path, model_sha256: str, plan_name: str, plan: Sequence[KVFormat],
                  page_size: int, tokens: int, bound: float, device: str, dtype: torch.dtype, cache_dir: Path,
                  say: Callable[[str], None],
                  measure: Callable[..., ProbeResult] = probe_in_own_process) -> ProbeResult:
    """The verdict, from the cache or measured now; raises UserError, one sentence, if its KL is above `bound`."""
    path = probe_file(cache_dir, model_sha256, plan, page_size, tokens, device, dtype)
    result = _cached(path)
    if result is None:
        say(f"probe: comparing full and quantized logits of {model_name} on {tokens} tokens, once for this plan")
        result = measure(model_path, plan, page_size, tokens, device, dtype)
        path.write_text(json.dumps(asdict(result)))
    if not result.kl <= bound:
        raise UserError(result.refusal(model_name, plan_name, bound))
    say(f"probe: {result.passed(model_name, plan_name, bound)}")
    return result


def _cached(path: Path) -> ProbeResult | None:
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text())
        return ProbeResult(**{**tree, "worst_layers": tuple(tuple(pair) for pair in tree["worst_layers"])})
    except (ValueError, KeyError, TypeError):
        return None  # a file of half a write or an older version is measured again
