"""From a made-up run to its published folder, and the lines that the console shows."""

import hashlib
from dataclasses import asdict

import pandas as pd
import pytest

from kvtuner_sglang.errors import MeasurementInvalid, UserError
from kvtuner_sglang.evidence.published import slug
from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.evidence.tidy_tables import to_csv
from kvtuner_sglang.kernel_bench.figures import figures, speedups
from kvtuner_sglang.kernel_bench.metrics import (
    ACCURATE,
    CEILING,
    FINITE,
    IN_TURN,
    SAME_BYTES,
    SAME_CACHES,
    rules_held,
)
from kvtuner_sglang.kernel_bench.publish import main, publish, tables
from kvtuner_sglang.kernel_bench.run import ceilings_over
from kvtuner_sglang.kernel_bench.samples import (
    Ceilings,
    Check,
    DecodeTimes,
    StoreCheck,
    StoreTimes,
    best,
    sample_of,
)
from kvtuner_sglang.kernel_bench.table import acceptance, cell_line, floor_us, verdict_line
from kvtuner_sglang.kernel_bench.tidy import COLUMNS, table_of_run


def samples_of(run_dir):
    return [sample_of(line) for line in read_samples(run_dir)]


def test_samples_survive_the_file(invented_run):
    lines = read_samples(invented_run())
    assert len(lines) > 50
    for line in lines:
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(sample_of(line)).items()} == line


def test_the_table_has_the_fastest_option_and_percentiles(invented_run):
    run_dir = invented_run()
    frame = table_of_run(run_dir, load_record(run_dir))
    assert tuple(frame.columns) == COLUMNS
    assert not frame.isna().any().any()
    assert len(frame) == 2 * 2 * 2 * (4 + 3)
    row = frame[(frame.kernel == "flashinfer") & (frame.format == "bf16")].iloc[0]
    assert row.floor_us / row.median_us == pytest.approx(0.9)
    assert row.p20_us < row.median_us < row.p80_us
    assert row.bytes / row.floor_us == pytest.approx(3000e3)
    assert set(frame.page) == {1, 64}
    assert set(frame.commit) == {"a" * 12}


def test_a_published_folder_is_whole(invented_run, tmp_path):
    run_dir, folder = invented_run(), tmp_path / "published" / "kernels"
    publish(run_dir, folder)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    gpu = "nvidia_test_card_80gb"
    assert names == {f"{gpu}/record.json", f"{gpu}/requests.jsonl", f"{gpu}.csv", "SHA256SUMS"}
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    frame = table_of_run(folder / gpu, load_record(folder / gpu))
    text = (folder / f"{gpu}.csv").read_text()
    assert text == to_csv(frame)
    assert tables(folder) == {f"{gpu}.csv": text}


def test_figures_of_every_gpu(invented_run, tmp_path):
    publish(invented_run(), tmp_path / "kernels")
    drawn = figures(tmp_path / "kernels")
    assert list(drawn) == ["nvidia_test_card_80gb_roofline", "nvidia_test_card_80gb_speedup"]
    for figure in drawn.values():
        assert any("NVIDIA Test Card 80GB" in text.get_text() for text in figure.texts)
        [legend] = figure.legends
        assert {"kv4", "FlashInfer fp8"} <= {text.get_text() for text in legend.get_texts()}


def test_only_a_finished_kernels_run_is_published(invented_run, tmp_path):
    with pytest.raises(UserError, match="is failed"):
        publish(invented_run(status="failed"), tmp_path / "kernels")
    run_dir = invented_run()
    (run_dir / "requests.jsonl").write_text("")
    with pytest.raises(UserError, match="not what the record says"):
        publish(run_dir, tmp_path / "kernels")
    with pytest.raises(SystemExit, match="run it first"):
        main([str(tmp_path), str(tmp_path / "kernels")])
    assert not (tmp_path / "kernels").exists()


def test_figures_refuse_what_mixes_runs(invented_run, tmp_path):
    run_dir = invented_run()
    frame = table_of_run(run_dir, load_record(run_dir))
    assert speedups(frame).query("kernel == 'flashinfer' and format == 'bf16'").speedup.eq(1).all()
    pd.concat([frame, frame.assign(commit="other")]).to_csv(tmp_path / "mixed.csv")
    with pytest.raises(UserError, match="mixes values of commit"):
        figures(tmp_path)
    with pytest.raises(UserError, match=r"kernels.peers=true"):
        speedups(frame[frame.kernel == "kvtuner"])


def test_gpu_names_become_file_names():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def test_console_lines(invented_run):
    samples = samples_of(invented_run())
    cell = [s for s in samples if isinstance(s, DecodeTimes) and (s.shape, s.batch, s.context) ==
            ("qwen2_5_7b", 16, 32768)]
    line = cell_line(cell, 3000.0)
    assert "\n" not in line
    assert all(part in line for part in ("28/4/128", "16 x 32768", "kv4 ", "FI bf16", "FI fp8", "SGL bf16",
                                         "0.80 of a plain read"))
    verdicts = [verdict_line(verdict) for verdict in acceptance(samples)]
    assert any("held" in v and "kv4 at 0.80 of a plain read there" in v for v in verdicts)
    assert any("missed" in v and "6.00 us a layer at batch 64" in v for v in verdicts)
    assert any("1 of 1 stores bit-exact" in v for v in verdicts)
    assert len(best(cell)) == 7


def test_the_record_keeps_the_verdicts(invented_run):
    run_dir = invented_run()
    assert load_record(run_dir).verdicts == tuple(acceptance(samples_of(run_dir)))
    assert len(load_record(run_dir).verdicts) > 5


def test_rules_are_of_what_was_checked(invented_run):
    samples = samples_of(invented_run())
    assert rules_held(samples) == (ACCURATE, SAME_BYTES, IN_TURN, FINITE, CEILING)
    assert SAME_CACHES in rules_held([*samples, Check("flashinfer", "bf16", "qwen2_5_7b", 2e-3, 2e-3)])
    assert SAME_BYTES not in rules_held([s for s in samples if not isinstance(s, StoreCheck)])
    assert rules_held([s for s in samples if not isinstance(s, DecodeTimes)]) == (ACCURATE, SAME_BYTES)


def test_no_row_is_below_its_floor(invented_run):
    samples = samples_of(invented_run())
    timed = [s for s in samples if isinstance(s, DecodeTimes | StoreTimes)]
    fastest = max(s.gb_s for s in timed if isinstance(s, DecodeTimes))
    found = ceilings_over(100.0, 2000.0, timed, "NVIDIA H100 80GB HBM3")
    assert found == Ceilings(2000.0, fastest)
    assert fastest > 2000.0
    assert all(floor_us(s, found.read_gb_s) <= s.median_us for s in best(samples))
    assert ceilings_over(2900.0, 3300.0, timed, None) == Ceilings(2900.0, 3300.0)
    with pytest.raises(MeasurementInvalid, match="more than the 2000 of this GPU's memory: a cache served it"):
        ceilings_over(2900.0, 3000.0, timed, "NVIDIA H100 PCIe")
