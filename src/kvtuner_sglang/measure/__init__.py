"""The seed report's three tests over HTTP: time to first token, throughput and latency under load, memory."""
