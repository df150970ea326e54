"""Low-bit KV caches for SGLang: an out-of-tree plugin and the artifact that measures it."""

__version__ = "0.1.0"
