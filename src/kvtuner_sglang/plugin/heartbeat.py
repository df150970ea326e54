"""A sign of life of every rank: SGLang itself does not notice a rank that is stopped or hangs."""

import json
import os
import time
from pathlib import Path
from typing import Any

from kvtuner_sglang.plugin.options import options_of

PERIOD_S = 1.0
_last_beat_s = 0.0


def before_recv_requests(receiver: Any, *_args: Any, **_kwargs: Any) -> None:
    """Runs once in every turn of every scheduler loop; writes the rank's file at most once a second."""
    global _last_beat_s
    folder = options_of(receiver.server_args).kvtuner_heartbeat_dir
    now = time.monotonic()
    if folder is None or now - _last_beat_s < PERIOD_S:
        return
    _last_beat_s = now
    ps, args = receiver.ps, receiver.server_args
    rank = ps.pp_rank * args.tp_size + ps.tp_rank
    beat(Path(folder), {"rank": rank, "node_rank": args.node_rank, "pid": os.getpid()})


def beat(folder: Path, who: dict[str, Any]) -> None:
    """Replace rank<rank>.json in one step, so that a reader never sees half a file."""
    path = folder / f"rank{who['rank']}.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({**who, "time": time.time(), "monotonic_ns": time.monotonic_ns()}))
    draft.replace(path)
