"""Finished runs of an ablation -> a published folder: records and samples, a table a machine, the seed's report again.

    python -m kvtuner_sglang.ablation.publish RUN_DIR... runs/published/ablation

RUN_DIR: folders under runs/ of finished jobs that differ in model, format and topology alone.  The last word is the
folder that is written to: what it holds stays, a run of the same name is replaced.  It gets record.json and
requests.jsonl of every run, <machine>.csv, SHA256SUMS and, beside each run of kv4 on tp2pp2, report.en.md and
report.zh.md.
"""

import sys
from collections.abc import Sequence

from kvtuner_sglang.ablation.tidy import table_of
from kvtuner_sglang.evidence.published import publish_main
from kvtuner_sglang.evidence.record import RunRecord
from kvtuner_sglang.evidence.tidy_tables import MachineTables
from kvtuner_sglang.report.ablation import siblings_among
from kvtuner_sglang.report.language import TEXTS
from kvtuner_sglang.report.markdown import render

SEED_CELL = {"dist": "tp2pp2", "quant": "kv4"}  # what the seed report is about


def reports(records: Sequence[RunRecord]) -> dict[str, str]:
    """The report, in every language, of each run of the seed's cell, its ablation table from the runs beside it."""
    seeds = [record for record in records
             if all(record.config[part]["name"] == name for part, name in SEED_CELL.items())]
    return {f"{record.name}/report.{language}.md": render(record, siblings_among(record, records), language=language)
            for record in seeds for language in TEXTS}


TABLES = MachineTables("serve", table_of, also=reports)
publish, tables = TABLES.publish, TABLES.tables

if __name__ == "__main__":
    publish_main(__doc__, sys.argv[1:], publish)
