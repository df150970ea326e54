"""Every phrase of the findings in English; another language is another table with these keys."""

TEXT: dict[str, str] = {
    "title": "The seed report's figures",
    "paragraph":
        "The seed report lists a mean time to first token of {claim_low:.2f} to {claim_high:.2f} ms for prompts of "
        "{shortest} to {longest} tokens to {seed_model} on four {gpu}. Its script sent every prompt to node 1 and took "
        "any JSON for an answer; node 1 serves nothing. We sent such prompts to node 1 of the same topology (TP={tp}, "
        "PP={pp}, {nnodes} nodes; {model}, {quant}; {machine}): all {replies} replies were HTTP 404, after "
        "{reply_low:.2f} to {reply_high:.2f} ms in the mean, {ratio_low:.2f} to {ratio_high:.2f} times the report's "
        "figures. No model ran. The same lengths sent to node 0 took {valid_low:.0f} to {valid_high:.0f} ms to a first "
        "token under every rule of validity. On the report's own cards, reading the weights of {seed_model} once takes "
        "{read_ms:.1f} ms by their data sheet, more than the slowest reply in its table ({claim_max:.2f} ms), and the "
        "arithmetic of {longest} tokens takes {longest_floor:.1f} ms, {longest_times:.1f} times its mean. Its "
        "{claim_rate:.0f} requests/s are the rate of error messages: here node 1 sends up to {reply_rate:.0f} of them "
        "a second, and node 0 answers {valid_rate:.2f} requests. Its memory table shows what a server preallocates "
        "({claim_used:.0%} of each card) and calls it the use of 4-bit keys and values.",
    "memory":
        "What the pool takes says as little here: {pool_mib:.0f} MiB of the {budget_mib:.0f} MiB that every rank may "
        "take ({share:.1%}), since it is made as large as they allow. What {quant} changes is what these bytes hold: "
        "{tokens} tokens instead of {full} in {dtype}.",
    "memory_title": "Memory: what a pool takes, and what it holds",
    "quant": "Format",
    "used": "Used by a rank (MiB)",
    "pool": "Largest pool of a rank (MiB)",
    "budget": "Its budget (MiB)",
    "kv_tokens": "KV tokens",
    "ttft": "Time to first token, or what was taken for it (ms: mean, smallest to largest)",
    "prompt": "Prompt",
    "tokens": "{n} tokens",
    "claimed": "Seed report, claimed",
    "not_found": "Node 1 here: HTTP 404",
    "ratio": "Ratio to the claim",
    "valid": "Node 0 here: valid TTFT",
    "floor": "Least possible here",
    "seed_floor": "Least possible on the seed's GPUs",
    "throughput": "Throughput test",
    "concurrency": "Concurrency",
    "claimed_rate": "Claimed (req/s)",
    "reply_rate": "Node 1 here: 404 replies/s",
    "script_success": "Success, by the script",
    "http_200": "Success, by HTTP status",
    "valid_rate": "Node 0 here: valid (req/s)",
    "claimed_latency": "Claimed (ms)",
    "reply_latency": "Node 1 here: 404 (ms)",
    "valid_latency": "Node 0 here: valid (ms)",
    "notes":
        "The claims are those of {source}; nothing of them was measured here. The least times are lower bounds: the "
        "prompt's arithmetic, or reading the weights once, at the peak of all ranks; for the seed's GPUs by the data "
        "sheet ({sheet}), for this machine {here}. Node 1's replies were timed as the script did it, on a connection "
        "each.",
    "here_measured": "measured and doubled",
}
