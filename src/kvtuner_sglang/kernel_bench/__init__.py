"""task=kernels: are the kernels right, and how fast are they beside FlashInfer and SGLang's own Triton kernel."""
