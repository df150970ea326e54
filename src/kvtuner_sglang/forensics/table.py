"""One record beside the seed's claims -> a tidy table: a row a test, level and series."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtuner_sglang.evidence.record import Metric, RunRecord
from kvtuner_sglang.forensics.claimed import Claimed, claimed

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("run", "test", "level", "series", "unit", "n", "mean", "min", "max", "machine", "commit")
TABLE_FILE = "forensics.csv"
TTFT, LATENCY, RATE = "ttft", "latency", "rate"  # level: prompt tokens, then requests at once
CLAIMED, CLAIMED_FLOOR = "claimed by the seed report", "floor of the seed's four RTX 4090"
NOT_FOUND, VALID, FLOOR = "node 1, HTTP 404", "node 0, valid", "floor of this machine"

Row = tuple[str, int, str, str, int | None, float, float, float]


def rows(record: RunRecord, seed: Claimed) -> list[Row]:
    """(test, level, series, unit, n, mean, min, max); a claim has no n, a floor has its one value three times."""
    found: list[Row] = []
    for tokens in record.levels("node1_reply_ms", "prompt_tokens"):
        claim, seed_floor = seed.ttft_at(tokens), seed.floor.prefill_ms(0, tokens)
        if claim is not None and seed_floor is not None:
            found.append((TTFT, tokens, CLAIMED, "ms", None, claim.mean_ms, claim.min_ms, claim.max_ms))
            found.append((TTFT, tokens, CLAIMED_FLOOR, "ms", 1, seed_floor, seed_floor, seed_floor))
        found += [_row(TTFT, tokens, series, record.metric(name, prompt_tokens=tokens)) for series, name in (
            (NOT_FOUND, "node1_reply_ms"), (VALID, "ttft_ms"), (FLOOR, "ttft_floor_ms"))]
    for level in record.levels("node1_replies_per_s", "concurrency"):
        throughput = seed.throughput_at(level)
        if throughput is not None:
            ms, rate = throughput.latency_ms, throughput.requests_per_s
            found += [(LATENCY, level, CLAIMED, "ms", None, ms, ms, ms),
                      (RATE, level, CLAIMED, "1/s", None, rate, rate, rate)]
        found += [_row(test, level, series, record.metric(name, concurrency=level)) for test, series, name in (
            (LATENCY, NOT_FOUND, "node1_loaded_reply_ms"), (LATENCY, VALID, "latency_ms"),
            (RATE, NOT_FOUND, "node1_replies_per_s"), (RATE, VALID, "requests_per_s"))]
    return found


def _row(test: str, level: int, series: str, metric: Metric) -> Row:
    unit = "1/s" if metric.unit == "req/s" else metric.unit
    return (test, level, series, unit, metric.n, metric.mean, metric.min, metric.max)


def table_of(records: Sequence[RunRecord]) -> "pd.DataFrame":
    """COLUMNS of all records, each beside the same claims."""
    import pandas as pd

    found = []
    for record in records:
        commit = (record.environment.git_sha or "unknown")[:12]
        found += [(record.name, *row, record.environment.machine, commit) for row in rows(record, claimed())]
    frame = pd.DataFrame(found, columns=list(COLUMNS))
    frame["n"] = frame["n"].astype("Int64")
    return frame
