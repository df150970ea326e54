"""Packed low-bit KV pages: their layout, the pure-torch reference, and the kernels that read and write them."""
