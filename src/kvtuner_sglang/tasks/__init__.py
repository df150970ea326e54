"""What run.py can do: one module per task, each with a run(...) -> Outcome."""

from collections.abc import Callable, Sequence
from importlib import import_module

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.evidence.outcome import Outcome
from kvtuner_sglang.evidence.record import RECORD_FILE, load_record

OF_WHAT_IS_PUBLISHED = ("claims", "figures", "paper")  # tasks that measure nothing


def run_task(config: RunConfig, overrides: Sequence[str], say: Callable[[str], None]) -> Outcome:
    """Run the configured task, unless its record is there and finished; raises UserError."""
    if config.task in OF_WHAT_IS_PUBLISHED:
        return import_module(f"kvtuner_sglang.tasks.{config.task}").run(say)
    if (config.run_dir / RECORD_FILE).exists() and not config.force:
        record = load_record(config.run_dir)
        if record.status == "ok":
            say(f"{config.run_dir}: finished at {record.ended}, skipped; force=true repeats it")
            if config.task == "serve":  # the record is the same, its report may be asked for in another language
                from kvtuner_sglang.report.markdown import write_report

                say(f"  report      {write_report(config.run_dir, language=config.report.language)}")
            return Outcome(config.run_dir, record.status, skipped=True, reason=None)
    # Imported here: a sweep whose jobs are all finished must not wait for SGLang's imports.
    if config.task == "quality":
        from kvtuner_sglang.tasks import quality

        return quality.run(config, overrides, say)
    if config.task == "probe":
        from kvtuner_sglang.tasks import probe

        return probe.run(config, say)
    if config.task == "kernels":
        from kvtuner_sglang.tasks import kernels

        return kernels.run(config, overrides, say)
    if config.task == "speed":
        from kvtuner_sglang.tasks import speed

        return speed.run(config, overrides, say)
    if config.task == "tune":
        from kvtuner_sglang.tasks import tune

        return tune.run(config, overrides, say)
    if config.task == "agreement":
        from kvtuner_sglang.tasks import agreement

        return agreement.run(config, overrides, say)
    if config.task == "forensics":
        from kvtuner_sglang.tasks import forensics

        return forensics.run(config, overrides, say)
    from kvtuner_sglang.tasks import serve

    return serve.run(config, overrides, say)
