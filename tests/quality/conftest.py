"""The tiny model that transformers runs here."""

from tiny_llama import tiny_checkpoint, tiny_model, tokens

__all__ = ["tiny_checkpoint", "tiny_model", "tokens"]
