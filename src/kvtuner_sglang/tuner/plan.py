"""The tuned plan as a file, with who made it, from what, and what it scored."""

from pathlib import Path

from kvtuner_sglang.evidence.assemble import utc_now
from kvtuner_sglang.evidence.record import Environment
from kvtuner_sglang.quality.prose import CALIBRATION
from kvtuner_sglang.quant import format_hash
from kvtuner_sglang.quant.plan_file import ModelIdentity, Provenance, plan_file, write_plan
from kvtuner_sglang.tuner.config import TuneConfig
from kvtuner_sglang.tuner.menu import layer_format
from kvtuner_sglang.tuner.run import Tuned

PLAN_FILE = "plan.yaml"


def write_tuned_plan(run_dir: Path, tuned: Tuned, model: ModelIdentity, environment: Environment,
                     tune: TuneConfig) -> Path:
    """run_dir/plan.yaml: served with the pages it was tuned for, and called after model, budget and formats."""
    score = tuned.compared[0].score
    provenance = Provenance(
        tool="kvtuner-sglang task=tune", commit=environment.git_sha, date=utc_now(),
        calibration=f"{CALIBRATION}, first {tune.calibration_tokens} tokens in windows of {tune.calibration_window}",
        score={"effective_bits": round(tuned.chosen.effective_bits, 6),
               "calibration_kl_nats": round(tuned.chosen.kl, 6), "heldout_kl_nats": round(score.kl, 6),
               "heldout_kl_se_nats": round(score.kl_se, 6)},
    )
    path = run_dir / PLAN_FILE
    name = f"{model.name}_{tune.bits:g}bit_page{tune.page_size}_{format_hash(tuned.chosen.plan)[:8]}"
    write_plan(path, plan_file([layer_format(fmt) for fmt in tuned.chosen.plan], model, provenance,
                               page_size=tune.page_size, name=name))
    return path
