"""Checkpoint folders without weights: a config.json that SGLang fills with random numbers (load_format=dummy).

The speed of a dense model depends on its shape, not on its weights.  What such a model writes means nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.serving.cache_folder import cache_folder

PREFIX = "dummy:"


@dataclass(frozen=True)
class DummyShape:
    """A Qwen2 decoder: biases on q, k and v, its own lm_head."""

    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int

    @property
    def parameters(self) -> int:
        q, kv = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * q + 2 * kv) + q + 2 * kv
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden

    def config(self) -> dict[str, Any]:
        """config.json, as transformers writes it."""
        return {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": self.layers,
            "hidden_size": self.hidden, "num_attention_heads": self.q_heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "intermediate_size": self.intermediate, "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0,
            "eos_token_id": 1, "use_sliding_window": False,
        }


SHAPES = {
    "qwen2_5_7b": DummyShape(layers=28, hidden=3584, q_heads=28, kv_heads=4, head_dim=128, intermediate=18944,
                             vocabulary=152064, positions=131072),
    "tiny": DummyShape(layers=2, hidden=256, q_heads=4, kv_heads=2, head_dim=64, intermediate=512, vocabulary=2048,
                       positions=4096),
}


def write_dummy(source: str) -> tuple[Path, DummyShape]:
    """The folder of `source`, "dummy:NAME", written into the cache; raises UserError if no such shape exists."""
    name = source.removeprefix(PREFIX)
    if name not in SHAPES:
        raise UserError(f"model.source={source} is no known shape: choose {PREFIX}{f' or {PREFIX}'.join(SHAPES)}.")
    folder = cache_folder("models") / f"dummy-{name}"
    folder.mkdir(exist_ok=True)
    text = json.dumps(SHAPES[name].config(), indent=1) + "\n"
    path = folder / "config.json"
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
    return folder, SHAPES[name]
