"""The process that makes the load, apart from ours so that nothing here delays a request; see bench_serving.py."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from os import environ
from pathlib import Path

from kvtuner_sglang.cpu_engine.environment import cpu_server_environment
from kvtuner_sglang.errors import RunFailed
from kvtuner_sglang.load.plan import Batch
from kvtuner_sglang.serving.abort import Abort
from kvtuner_sglang.serving.client import Sample

START_TIMEOUT_S = 180.0
POLL_S = 0.2
LOG_FILE = "generator.log"
SUMMARY_FILE = "bench_serving.jsonl"


@dataclass(frozen=True)
class Generator:
    """A started generator; every sample goes to `keep` as it ends."""

    process: "subprocess.Popen[bytes]"
    connection: Connection
    log_path: Path
    abort: Abort
    keep: Callable[[Sample], None]

    def send(self, batch: Batch) -> list[Sample]:
        """The batch's samples, as they ended; raises RunFailed if the generator or a rank was lost."""
        try:
            self.connection.send(batch)
        except OSError as error:
            raise RunFailed(f"the load generator ended: see {self.log_path}.") from error
        samples: list[Sample] = []
        # A request ends by its own bound, so a batch that is late by a minute has lost its generator.
        while (sample := self.receive(batch.requests * batch.timeout_s + 60.0)) is not None:
            self.keep(sample)
            samples.append(sample)
        return samples

    def receive(self, timeout_s: float) -> Sample | None:
        """The next sample, or None: ready, or the end of a batch."""
        waited = 0.0
        while not self.connection.poll(POLL_S):
            waited += POLL_S
            if self.abort.is_set():
                raise RunFailed(f"the load was given up: {self.abort.reason}.")
            if waited > timeout_s:
                raise RunFailed(f"the load generator said nothing for {waited:.0f} s: see {self.log_path}.")
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise RunFailed(f"the load generator ended: see {self.log_path}.") from error


@contextlib.contextmanager
def load_generator(base_url: str, model: Path, folder: Path, device: str, abort: Abort,
                   keep: Callable[[Sample], None]) -> Iterator[Generator]:
    """A generator for the server at `base_url`; leaves its log and bench_serving's summaries in `folder`, no process.

    Raises RunFailed if it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours, theirs = Pipe()
    command = [sys.executable, "-m", "kvtuner_sglang.load.bench_serving", str(theirs.fileno()), base_url, str(model),
               str(folder / SUMMARY_FILE)]
    # Without a GPU SGLang's imports need the stand-ins on PYTHONPATH.
    extra = cpu_server_environment(1, 1, 0) if device == "cpu" else {"HF_HUB_OFFLINE": "1"}
    with (folder / LOG_FILE).open("wb") as log, ours:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                   pass_fds=[theirs.fileno()], env={**environ, **extra}, start_new_session=True)
        theirs.close()  # so that its end is seen as the end of the connection
        generator = Generator(process, ours, folder / LOG_FILE, abort, keep)
        try:
            generator.receive(START_TIMEOUT_S)
            yield generator
        finally:
            process.kill()
            process.wait()
