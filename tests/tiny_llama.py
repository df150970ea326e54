"""A tiny random Llama with 64-channel heads, and its tokens: the exactness of a path shows on random weights."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvtuner_sglang.quality import transformers_path

LAYERS = 3
VOCABULARY = 256


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    config = AutoConfig.for_model(
        "llama", hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, initializer_range=0.15,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint):
    return transformers_path.load_model(tiny_checkpoint, torch.float32, "cpu")


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(0, VOCABULARY, (230,), generator=torch.Generator().manual_seed(1)).tolist()
