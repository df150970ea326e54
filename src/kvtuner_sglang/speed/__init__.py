"""How fast one engine serves one format: tokens that fit, decoding, time to first token."""
