"""Finished runs of an ablation -> a published folder: their records and samples, and a tidy table for each machine.

    python -m kvtuner_sglang.ablation.publish RUN_DIR... runs/published/ablation
"""

import sys

from kvtuner_sglang.ablation.tidy import table_of
from kvtuner_sglang.evidence.published import publish_main
from kvtuner_sglang.evidence.tidy_tables import MachineTables

TABLES = MachineTables("serve", table_of)
publish, tables = TABLES.publish, TABLES.tables

if __name__ == "__main__":
    publish_main(__doc__, sys.argv[1:], publish)
