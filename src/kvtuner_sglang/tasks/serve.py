"""task=serve: start the servers, run the seed report's three tests, write the record, its mirror and the report."""

from collections.abc import Callable, Sequence

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.evidence import tracking
from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.record import load_record
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.measure.physics import floor_of_run
from kvtuner_sglang.measure.seed_tests import run_seed_tests
from kvtuner_sglang.report.console import print_summary
from kvtuner_sglang.report.markdown import write_report
from kvtuner_sglang.serving.checkpoint import prepare_checkpoint
from kvtuner_sglang.serving.cluster import running_cluster
from kvtuner_sglang.serving.dummy_checkpoint import is_dummy
from kvtuner_sglang.tasks.probe import require_probed
from kvtuner_sglang.tasks.recorded import Attempt, record
from kvtuner_sglang.tasks.run_directory import run_directory

Say = Callable[[str], None]


def run(config: RunConfig, overrides: Sequence[str], say: Say) -> Outcome:
    """One run from checkpoint to report. Bad input raises UserError and leaves nothing behind.

    A run that started and broke is an outcome with status failed, or invalid when samples may not count.
    """
    checkpoint = prepare_checkpoint(config.model.source, config.model.path, say)
    config.quant.require_fits(checkpoint.identity)
    if is_dummy(checkpoint):
        say("probe: the weights are random, so there is no quality to protect")
    elif config.quality.probe:
        require_probed(config, checkpoint, say)
    say(f"{config.run_dir}")

    def measure(attempt: Attempt, log: SampleLog) -> Figures:
        # Before there is a server: one that idles keeps a core busy.
        floor = floor_of_run(config, checkpoint, attempt.environment.machine, say)
        with running_cluster(config, checkpoint, config.run_dir, say) as cluster:
            attempt.commands = cluster.commands
            return run_seed_tests(cluster, config, checkpoint, say, log.append, floor)

    with run_directory(config.run_dir):
        attempt = record(config, overrides, measure, checkpoint=checkpoint)
        report = write_report(config.run_dir)
        tracking.mirror(config.run_dir)
        say(print_summary(load_record(config.run_dir)))
        say(f"  report      {report}")
    return attempt.outcome(config)
