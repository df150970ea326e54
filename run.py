"""python run.py [group=option ...] [key=value ...]     e.g.  python run.py quant=kv4 dist=tp2pp2;  -m for sweeps."""

import sys
from pathlib import Path

try:
    import hydra
except ImportError:
    sys.exit("kvtuner: this Python has no hydra-core: run `make setup`, then .venv/bin/python run.py.")
from omegaconf import DictConfig, OmegaConf

from kvtuner_sglang import command_line
from kvtuner_sglang.evidence.outcome import Outcome

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> Outcome:
    """One run, or one job of a sweep."""
    return command_line.run_job(OmegaConf.to_container(cfg, resolve=True))


if __name__ == "__main__":
    command_line.check(sys.argv[1:], CONF)
    try:
        job()
    except KeyboardInterrupt:
        sys.stderr.write("kvtuner: interrupted: every process it started is ended, and this run has no record.\n")
        sys.exit(130)
    sys.exit(command_line.exit_code())
