"""The server under test as the workloads see it: send requests, keep every sample, notice a lost rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvtuner_sglang.serving import client
from kvtuner_sglang.serving.abort import Abort
from kvtuner_sglang.serving.client import Request, Sample


class Server(Protocol):
    """The part of serving.cluster.Cluster that measuring needs."""

    @property
    def base_url(self) -> str: ...

    @property
    def server_info(self) -> dict[str, Any]: ...

    @property
    def abort(self) -> Abort: ...

    def check(self, wait_s: float = 0.0) -> None:
        """Raise RunFailed if a rank died or froze."""


@dataclass(frozen=True)
class Target:
    """A running server, the bound on each request in seconds, and where every sample goes, valid or not."""

    server: Server
    timeout_s: float
    keep: Callable[[Sample], None]

    def send(self, kind: str, prompts: Sequence[Sequence[int]], output_tokens: int, concurrency: int) -> list[Sample]:
        """Send all prompts in a closed loop of `concurrency`; raises RunFailed if a rank was lost meanwhile."""
        requests = [Request(f"{kind}-{prompt[0]}", kind, prompt, output_tokens) for prompt in prompts]
        samples = client.closed_loop(self.server.base_url, requests, concurrency, self.timeout_s, self.server.abort)
        for sample in samples:
            self.keep(sample)
        self.server.check()
        return samples

    def flush_cache(self) -> None:
        """Empty the prefix cache; raises RunFailed if the server does not say that it did."""
        client.flush_cache(self.server.base_url)
