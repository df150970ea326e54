"""task=forensics: the seed report's tests against node 1, as its script ran them, and against node 0, done right."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvtuner_sglang.config import RunConfig, SeedTests
from kvtuner_sglang.evidence import tracking
from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.record import Metric, load_record
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.forensics import findings
from kvtuner_sglang.forensics.as_the_script import run_script
from kvtuner_sglang.forensics.report import console_lines, write_findings
from kvtuner_sglang.measure.physics import floor_of_run
from kvtuner_sglang.measure.prompts import PromptSource
from kvtuner_sglang.measure.seed_tests import run_seed_tests
from kvtuner_sglang.serving.checkpoint import Checkpoint, prepare_checkpoint
from kvtuner_sglang.serving.client import stream_generate
from kvtuner_sglang.serving.cluster import Cluster, running_cluster
from kvtuner_sglang.serving.dummy_checkpoint import is_dummy
from kvtuner_sglang.tasks.probe import require_probed
from kvtuner_sglang.tasks.recorded import Attempt, record
from kvtuner_sglang.tasks.run_directory import run_directory

CHECKED = "node1_checked"
CHECKED_TOKENS = 8
Say = Callable[[str], None]


def run(config: RunConfig, overrides: Sequence[str], say: Say) -> Outcome:
    """One run from checkpoint to report. Bad input raises UserError and leaves nothing behind.

    A node 1 that does not behave as the seed's did, or a node 0 whose samples may not count, makes the run invalid.
    """
    checkpoint = prepare_checkpoint(config.model.source, config.model.path, say)
    config.quant.require_fits(checkpoint.identity)
    if config.quality.probe and not is_dummy(checkpoint):
        require_probed(config, checkpoint, say)
    say(f"{config.run_dir}")

    def measure(attempt: Attempt, log: SampleLog) -> Figures:
        floor = floor_of_run(config, checkpoint, attempt.environment.machine, say)
        with running_cluster(config, checkpoint, config.run_dir, say) as cluster:
            attempt.commands = cluster.commands
            # The script last: its posts take milliseconds, and four ranks that have just started are not idle yet.
            right = run_seed_tests(cluster, config, checkpoint, say, log.append, floor)
            wrong = _as_the_script_did(cluster, config, checkpoint, log, say)
            return replace(right, metrics=wrong | right.metrics, rules=(*findings.RULES, *right.rules))

    with run_directory(config.run_dir):
        attempt = record(config, overrides, measure, checkpoint=checkpoint)
        report = write_findings(config.run_dir)
        tracking.mirror(config.run_dir)
        for line in console_lines(load_record(config.run_dir)):
            say(line)
        say(f"  report      {report}")
    return attempt.outcome(config)


def _as_the_script_did(cluster: Cluster, config: RunConfig, checkpoint: Checkpoint, log: SampleLog,
                       say: Say) -> dict[str, Metric]:
    """The script's replies as metrics, once they are known to be 404 and our own client has refused the same node."""
    node1 = cluster.node_urls[1]
    tests = config.workload
    if not isinstance(tests, SeedTests):
        raise TypeError(f"workload {tests.name} is a load: the seed's script had none")
    replies = run_script(node1, tests.ttft, tests.throughput, log.append)
    say(f"node 1 answered {len(replies)} posts, {sum(r.http_status == findings.NOT_FOUND for r in replies)} of them "
        "with HTTP 404")
    findings.require_not_found(replies)
    [prompt] = PromptSource(checkpoint.vocab_size, config.seed).take(1, CHECKED_TOKENS)
    checked = stream_generate(node1, prompt, CHECKED_TOKENS, config.server.request_timeout_s, request_id=CHECKED,
                              kind=CHECKED, abort=cluster.abort)
    log.append(checked)
    findings.require_refused(checked)
    return findings.reply_metrics(replies)
