"""`python -m kvtuner_sglang.serving.gguf_conversion FILE.gguf FOLDER`: a GGUF as a float32 checkpoint of its own.

A process of its own, so that neither torch nor the memoized readers below stay in the process that serves.
Uses transformers' GGUF loader.  The result is untied: with tied embeddings SGLang's last pipeline stage has no
`lm_head` to quantize and dies, so the embedding is saved a second time under that name.
"""

import argparse
from functools import cache
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase


def convert(source: Path, folder: Path) -> None:
    """Write config, tokenizer and `model.safetensors` (float32, with its own lm_head) of `source` into `folder`."""
    # transformers parses the same file three times and rebuilds one table for every module: 25 of 40 seconds.
    for slow in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, slow, cache(getattr(gguf, slow)))
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**place)

    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model._tied_weights_keys = None  # noqa: SLF001 (save_pretrained drops the second copy otherwise)
        model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    _name_special_tokens(tokenizer, model.config)

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """transformers 5.12.1 takes the first special token for the end of text; the GGUF's own ids are in the config."""
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = config.max_position_embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=convert.__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    convert(asked.source, asked.folder)


if __name__ == "__main__":
    main()
