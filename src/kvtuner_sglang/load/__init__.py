"""A server under load: closed and open loops, long contexts, conversations and the highest rate within an SLO."""
