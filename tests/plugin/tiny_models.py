"""Tiny random checkpoints of real architectures: SGLang's own loading code runs on them in seconds."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def save_tiny(folder: Path, model_type: str, **changes: int) -> Path:
    """A two-layer model with untied embeddings; `changes` override its config."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
