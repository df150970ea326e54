"""task=agreement: the same greedy requests on one rank and on every parallel layout, into a record.

No probe goes before it: whether layouts agree says nothing of a format's quality.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvtuner_sglang.agreement.answers import Answer, ask, prompts_of
from kvtuner_sglang.agreement.compare import NOISE
from kvtuner_sglang.agreement.figures import FLOOR, REFERENCE, figures, samples, table
from kvtuner_sglang.config import DistConfig, RunConfig
from kvtuner_sglang.evidence import tracking
from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.measure.memory import kv_record
from kvtuner_sglang.serving.checkpoint import Checkpoint, prepare_checkpoint
from kvtuner_sglang.serving.cluster import running_cluster
from kvtuner_sglang.serving.commands import Measurement, serving_dtype
from kvtuner_sglang.serving.device import serving_device
from kvtuner_sglang.tasks.recorded import Attempt, record
from kvtuner_sglang.tasks.run_directory import run_directory

Say = Callable[[str], None]


def run(config: RunConfig, overrides: Sequence[str], say: Say) -> Outcome:
    """Serve one layout after another and write the record. Bad input raises UserError and leaves nothing behind.

    A server that broke is an outcome with status failed, an answer that is not whole one with status invalid.  Layouts
    that do not agree are a figure ("within"), not a reason to fail.
    """
    checkpoint = prepare_checkpoint(config.model.source, config.model.path, say)
    config.quant.require_fits(checkpoint.identity)
    asked = config.agreement
    prompts = prompts_of(checkpoint.path, asked.prompts, asked.prompt_tokens)
    dtype = serving_dtype(config, serving_device(config.server))
    say(f"{config.run_dir}")

    def measure(attempt: Attempt, log: SampleLog) -> Figures:
        def answers(name: str, dist: DistConfig, noise: float = 0.0) -> tuple[list[Answer], dict[str, Any]]:
            return _serve_and_ask(config, dist, checkpoint, name, prompts, noise, attempt, log, say)

        reference, state = answers(REFERENCE, config.dist)
        others = {}
        if config.quant.enabled:
            others[FLOOR], _ = answers(FLOOR, config.dist, asked.noise or NOISE[dtype])
        for name in asked.dists:
            others[name], _ = answers(name, asked.layouts[name])
        return figures(reference, others, kv_record(state, config))

    with run_directory(config.run_dir):
        attempt = record(config, overrides, measure, checkpoint=replace(checkpoint, dtype_name=dtype))
        tracking.mirror(config.run_dir)
    for line in table(attempt.figures) if attempt.figures else [f"  {attempt.status}: {attempt.reason}"]:
        say(line)
    return attempt.outcome(config)


def _serve_and_ask(config: RunConfig, dist: DistConfig, checkpoint: Checkpoint, name: str, prompts: list[list[int]],
                   noise: float, attempt: Attempt, log: SampleLog, say: Say) -> tuple[list[Answer], dict[str, Any]]:
    """Answers of one layout's own servers, and what they say of their pools."""
    asked = config.agreement
    say(f"{name}: tp={dist.tp} pp={dist.pp} on {dist.nnodes} nodes")
    with running_cluster(replace(config, dist=dist), checkpoint, config.run_dir / "servers" / name, say,
                         Measurement(kv_noise=noise)) as cluster:
        attempt.commands += cluster.commands
        found = ask(cluster.base_url, prompts, asked.new_tokens, asked.at_once,
                    timeout_s=config.server.request_timeout_s)
    for sample in samples(name, found):
        log.append(sample)
    return found, cluster.server_info["kvtuner"]
