"""A copy of a model that computes the same function with outlier keys, as large Qwen2.5 models have them.

A pair of rotary channels (c and c + head_dim / 2) of a kv head is scaled by s in k_proj and by 1 / s in q_proj, for
every q head that reads the kv head.  s is a power of two, so full precision gives the same bits; a format whose groups
mix channels gets a range up to 64 times too wide.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kvtuner_sglang.errors import UserError

PAIRS_PER_HEAD = 3
FACTORS = (16.0, 32.0, 64.0)
WEIGHTS = "model.safetensors"


def write_stress_copy(source: Path, out: Path, seed: int = 0) -> Path:
    """Write the copy of the checkpoint folder `source` to `out`; returns `out`.

    Raises UserError if the checkpoint is not one model.safetensors with split q_proj and k_proj.
    """
    weights = source / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{source} has no {WEIGHTS}: a stress copy is made of checkpoints in one file.")
    config = json.loads((source / "config.json").read_text())
    state = load_file(weights)
    if "model.layers.0.self_attn.k_proj.weight" not in state:
        raise UserError(f"{source} has no separate k_proj: a stress copy needs a Llama or Qwen2 checkpoint.")
    q_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // q_heads
    rng = random.Random(f"stress-{seed}")
    for layer in range(config["num_hidden_layers"]):
        scale = _key_scales(rng, kv_heads, head_dim)
        _scale_rows(state, f"model.layers.{layer}.self_attn.k_proj", scale.flatten())
        _scale_rows(state, f"model.layers.{layer}.self_attn.q_proj",
                    (1 / scale).repeat_interleave(q_heads // kv_heads, 0).flatten())
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(out.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft, ignore=shutil.ignore_patterns(WEIGHTS))
    save_file(state, draft / WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(out, ignore_errors=True)
    draft.replace(out)
    return out


def _key_scales(rng: random.Random, kv_heads: int, head_dim: int) -> torch.Tensor:
    """(kv_heads, head_dim): 1 but for a few rotary pairs."""
    scale = torch.ones(kv_heads, head_dim)
    half = head_dim // 2
    for head in range(kv_heads):
        pairs = rng.sample(range(half), PAIRS_PER_HEAD)
        for pair, factor in zip(pairs, FACTORS, strict=True):
            scale[head, [pair, pair + half]] = factor
    return scale


def _scale_rows(state: dict[str, torch.Tensor], name: str, scale: torch.Tensor) -> None:
    for kind in ("weight", "bias"):
        tensor = state.get(f"{name}.{kind}")
        if tensor is not None:
            shape = (-1,) + (1,) * (tensor.dim() - 1)
            state[f"{name}.{kind}"] = (tensor * scale.to(tensor.dtype).view(shape)).contiguous()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m kvtuner_sglang.quality.stress CHECKPOINT_FOLDER OUT_FOLDER")
    try:
        write_stress_copy(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"kvtuner: {error}")
