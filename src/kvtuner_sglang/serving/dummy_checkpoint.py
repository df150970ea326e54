"""Checkpoint folders without weights: a config.json that SGLang fills with random numbers (load_format=dummy).

The speed of a dense model depends on its shape, not on its weights.  What such a model writes means nothing; so that a
server can write it at all, the folder has a tokenizer: letters, and for all other ids their numbers ("t170").
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.serving.cache_folder import cache_folder

PREFIX = "dummy:"
RANDOM_WEIGHTS = "The weights are random (load_format=dummy): speed does not depend on them; the text means nothing."


class Named(Protocol):
    """A model's configuration or its checkpoint."""

    @property
    def source(self) -> str: ...


def is_dummy(model: Named) -> bool:
    return model.source.startswith(PREFIX)


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
    for file, content in (("config.json", SHAPES[name].config()),
                          ("tokenizer.json", tokenizer(SHAPES[name].vocabulary)),
                          ("tokenizer_config.json", TOKENIZER_CONFIG)):
        _write_if_changed(folder / file, json.dumps(content, indent=1) + "\n")
    return folder, SHAPES[name]


# transformers takes this class for every checkpoint of this architecture, whatever the file says.
TOKENIZER_CONFIG = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": "t0", "eos_token": "t1", "pad_token": "t1",
                    "unk_token": "t2", "clean_up_tokenization_spaces": False}
SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # as byte-level BPE writes it
ASCII = (SPACE, *(chr(code) for code in range(0x21, 0x7F)))


def tokenizer(vocabulary: int) -> dict[str, Any]:
    """tokenizer.json, byte-level BPE without merges: ids from 3 are printable ASCII, each other id n the word "tn".

    So every id reads as some text, and every ASCII text has ids.
    """
    words = [f"t{n}" for n in range(vocabulary)]
    words[3 : 3 + len(ASCII)] = ASCII
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {word: n for n, word in enumerate(words)}, "merges": []},
    }


def _write_if_changed(path: Path, text: str) -> None:
    """Whole or not at all: other runs may be reading it."""
    if path.is_file() and path.read_text() == text:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
