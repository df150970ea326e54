"""At which level a load is summed up in one row."""

from kvtuner_sglang.evidence.record import RunRecord


def rated_levels(record: RunRecord) -> list[str]:
    """ "concurrency=4" or "rate_per_s=0.5", ascending: where a load has rates; none of other runs."""
    name = "goodput_per_s/"
    return sorted((key.removeprefix(name) for key in record.metrics if key.startswith(name)), key=_value)


def summary_level(record: RunRecord) -> str | None:
    """The highest level; of a capacity the highest rate tried that is not above it, or the lowest; None of no load."""
    levels = rated_levels(record)
    if "capacity_per_s" in record.metrics:
        within = [level for level in levels if _value(level) <= record.metrics["capacity_per_s"].mean]
        levels = within or levels[:1]
    return levels[-1] if levels else None


def _value(level: str) -> float:
    return float(level.partition("=")[2])
