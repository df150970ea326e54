"""Reads the log that W&B leaves of an offline run: protobuf messages in the framing of LevelDB's logs.

wandb 0.31 has no reader for it in Python.  After seven bytes of header come blocks of 32 KiB with fragments: checksum
(4 bytes), length (2, little end first), kind (1: whole, 2: first, 3: middle, 4: last).
https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK_BYTES, HEADER, FRAGMENT = 32768, b":W&B", struct.Struct("<IHB")
HEADER_BYTES, ENDS_A_MESSAGE = 7, (1, 4)


def messages(path: Path) -> Iterator[Any]:
    """Every wandb_internal_pb2.Record of a run-*.wandb file, in order."""
    data = path.read_bytes()
    assert data.startswith(HEADER)
    place, parts = HEADER_BYTES, []
    while place + FRAGMENT.size <= len(data):
        left = BLOCK_BYTES - place % BLOCK_BYTES
        if left < FRAGMENT.size:  # too short for a fragment: padding
            place += left
            continue
        _, length, kind = FRAGMENT.unpack_from(data, place)
        parts.append(data[place + FRAGMENT.size : place + FRAGMENT.size + length])
        place += FRAGMENT.size + length
        if kind in ENDS_A_MESSAGE:
            message = wandb_internal_pb2.Record()
            message.ParseFromString(b"".join(parts))
            parts = []
            yield message


def values(updates: Any) -> dict[str, Any]:
    """Of a list of updates {key or nested_key: value}; nested keys joined by "."."""
    return {update.key or ".".join(update.nested_key): json.loads(update.value_json) for update in updates}
