"""What runs/published/forensics says is what its records give, and it shows what the seed report did."""

from pathlib import Path

import pytest

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.evidence.samples import read_samples
from kvtuner_sglang.evidence.tidy_tables import to_csv
from kvtuner_sglang.forensics import publish as publish_module
from kvtuner_sglang.forensics.claimed import claimed
from kvtuner_sglang.forensics.publish import published, readme
from kvtuner_sglang.forensics.report import paragraph
from kvtuner_sglang.forensics.table import table_of

FOLDER = Path(__file__).parents[2] / "runs" / "published" / "forensics"


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    return published(FOLDER)


def test_table_paragraph_and_readme_are_what_the_records_give(records: list[RunRecord]) -> None:
    assert (FOLDER / "forensics.csv").read_text() == to_csv(table_of(records))
    assert (FOLDER / "paragraph.md").read_text() == paragraph(records[0], claimed()) + "\n"
    assert (FOLDER / "README.md").read_text() == readme(records)


def test_the_seeds_column_is_that_of_404_replies(records: list[RunRecord]) -> None:
    """Its five means within a factor of two, and every sample of them labelled as what it is."""
    for row in claimed().ttft:
        reply = records[0].metric("node1_reply_ms", prompt_tokens=row.prompt_tokens)
        assert 0.5 < reply.mean / row.mean_ms < 2
        assert reply.max < records[0].metric("ttft_ms", prompt_tokens=row.prompt_tokens).min
    replies = [s for s in read_samples(FOLDER / records[0].name) if s["kind"] == "node1_reply"]
    assert {sample["http_status"] for sample in replies} == {404}
    assert len(replies) == sum(m.n for key, m in records[0].metrics.items() if key.startswith("node1_reply_ms/"))


def test_nothing_is_written_if_a_text_cannot_be_made(records: list[RunRecord], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise UserError("no paragraph")

    monkeypatch.setattr(publish_module, "paragraph", refuse)
    with pytest.raises(UserError, match="no paragraph"):
        publish_module.publish([FOLDER / records[0].name], tmp_path / "forensics")
    assert not (tmp_path / "forensics").exists()
