"""requests.jsonl: every request that was sent, one line each, written as it ends so that a crash loses none."""

import json
import threading
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvtuner_sglang.evidence.record import SamplesFile, file_sha256

SAMPLES_FILE = "requests.jsonl"


class SampleLog:
    """Appends samples (dataclass instances) to run_dir/requests.jsonl; safe to call from several threads."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / SAMPLES_FILE
        self.count = 0
        self._lock = threading.Lock()
        self._file = self.path.open("w", encoding="utf-8")

    def append(self, sample: Any) -> None:
        line = json.dumps(asdict(sample), ensure_ascii=False)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()
            self.count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._file.close()

    def summary(self) -> SamplesFile:
        """Name, number of lines and hash, for the record; call it once the log is closed."""
        return SamplesFile(file=self.path.name, count=self.count, sha256=file_sha256(self.path))


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The samples of a run as dictionaries, in the order in which they ended."""
    return [json.loads(line) for line in (run_dir / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()]
