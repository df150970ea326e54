"""Finished runs of task=speed -> a published folder: their records and samples, a tidy table for each GPU.

    python -m kvtuner_sglang.speed.publish RUN_DIR... runs/published/engine
"""

import sys

from kvtuner_sglang.evidence.published import publish_main
from kvtuner_sglang.evidence.tidy_tables import MachineTables
from kvtuner_sglang.speed.tidy import table_of

TABLES = MachineTables("speed", table_of, "gpu")
publish, tables = TABLES.publish, TABLES.tables

if __name__ == "__main__":
    publish_main(__doc__, sys.argv[1:], publish)
