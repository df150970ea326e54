"""task=kernels: the kernels alone, beside their peers, on one GPU, into a record."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.evidence import tracking
from kvtuner_sglang.evidence.assemble import Figures
from kvtuner_sglang.evidence.environment import PROJECT_ROOT
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.kernel_bench.metrics import figures
from kvtuner_sglang.kernel_bench.run import bench, require_device
from kvtuner_sglang.kernel_bench.samples import Sample
from kvtuner_sglang.kernel_bench.table import verdict_line
from kvtuner_sglang.serving.commands import NodeCommand
from kvtuner_sglang.tasks.recorded import Attempt, record
from kvtuner_sglang.tasks.run_directory import run_directory

Say = Callable[[str], None]


def run(config: RunConfig, overrides: Sequence[str], say: Say) -> Outcome:
    """Measure and write the record. Without a GPU raises UserError and leaves nothing behind.

    A kernel or peer that cannot run is an outcome with status failed, a wrong one an outcome with status invalid.
    """
    require_device(config.kernels)
    say(f"{config.run_dir}")
    samples: list[Sample] = []

    def measure(attempt: Attempt, log: SampleLog) -> Figures:
        attempt.commands = (_command(overrides),)
        for sample in bench(config.kernels, config.seed, say):
            log.append(sample)
            samples.append(sample)
        return figures(samples)

    with run_directory(config.run_dir):
        attempt = record(config, overrides, measure, checkpoint=None)
        tracking.mirror(config.run_dir)
    found = attempt.figures
    for line in map(verdict_line, found.verdicts) if found else (f"  {attempt.status}: {attempt.reason}",):
        say(line)
    return attempt.outcome(config)


def _command(overrides: Sequence[str]) -> NodeCommand:
    """All of it runs in this process; its words as they are typed in the project's folder."""
    script = Path("run.py") if (PROJECT_ROOT / "run.py").exists() else Path(sys.argv[0])
    return NodeCommand(0, ("python", str(script), *overrides), {}, "127.0.0.1", 0)
