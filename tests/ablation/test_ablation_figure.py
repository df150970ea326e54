"""The figure of an ablation shows what its table has: a bar a format and layout, under the most load of each."""

import pandas as pd
import pytest

from kvtuner_sglang.ablation.figure import MEASURES, served_figure
from kvtuner_sglang.ablation.tidy import COLUMNS


def table() -> pd.DataFrame:
    """Two formats on two layouts, but kv4 on tp2 was not run."""
    rows = []
    for dist, quant, tokens, ttft, rate in (("single", "bf16", 100, 10.0, 5.0), ("tp2", "bf16", 200, 20.0, 4.0),
                                            ("single", "kv4", 700, 30.0, 3.0)):
        shared = {"machine": "m", "model": "tiny", "dist": dist, "quant": quant, "kv_tokens": tokens, "commit": "c"}
        rows += [{**shared, "prompt_tokens": n, "concurrency": 1, "ttft_p50_ms": ttft * n} for n in (10, 50)]
        rows += [{**shared, "prompt_tokens": 32, "concurrency": n, "output_tok_s": rate * n} for n in (1, 4)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


EXPECTED = {
    "kv_tokens": {"bf16": [100, 200], "kv4": [700, None]},
    "ttft_p50_ms": {"bf16": [500, 1000], "kv4": [1500, None]},
    "output_tok_s": {"bf16": [20, 16], "kv4": [12, None]},
}


@pytest.mark.parametrize("measure", MEASURES)
def test_bars_are_the_rows_under_most_load_and_a_missing_job_has_none(measure: str) -> None:
    figure = served_figure(table())
    ax = figure.axes[MEASURES.index(measure)]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["single", "tp2"]
    shown = {bars.get_label(): [None if pd.isna(bar.get_height()) else bar.get_height() for bar in bars]
             for bars in ax.containers}
    assert shown == EXPECTED[measure]


def test_times_of_another_machine_are_hatched_and_memory_is_not() -> None:
    frame = table().assign(tpot_floor_ms=[2.0] * 8 + [3.0] * 4)
    memory, *times = served_figure(frame).axes
    for ax in times:
        hatched = {bars.get_label(): [bool(bar.get_hatch()) for bar in bars] for bars in ax.containers}
        assert hatched == {"bf16": [False, False], "kv4": [True, False]}
    assert not any(bar.get_hatch() for bar in memory.patches)


def test_a_plan_is_not_drawn_nor_named() -> None:
    plan = table().query("quant == 'kv4'").assign(quant="plan_x", dist="pp2", commit="other")
    figure = served_figure(pd.concat([table(), plan]))
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["single", "tp2"]
    assert "other" not in figure.get_suptitle()


def test_labels_name_the_load() -> None:
    labels = [ax.get_ylabel() for ax in served_figure(table()).axes]
    assert "50 tokens" in labels[1]
    assert "4 at once" in labels[2]
