"""What a KV format costs: logits, perplexity, recall and arithmetic against the same model in full precision."""
