"""Finished load workloads -> a published folder: their records and samples, and a tidy table for each machine.

    python -m kvtuner_sglang.load.publish runs/serve-*-capacity-* runs/published/load
"""

import sys

from kvtuner_sglang.evidence.published import publish_main
from kvtuner_sglang.evidence.tidy_tables import MachineTables
from kvtuner_sglang.load.tidy import table_of

TABLES = MachineTables("serve", table_of)
publish, tables = TABLES.publish, TABLES.tables

if __name__ == "__main__":
    publish_main(__doc__, sys.argv[1:], publish)
