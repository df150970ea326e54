"""What stands between run.py and the tasks: every job is checked before the first one starts."""

import contextlib
import itertools
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvtuner_sglang.config import RunConfig, parse
from kvtuner_sglang.config_checks import check_given
from kvtuner_sglang.errors import ConfigError, UserError
from kvtuner_sglang.evidence.outcome import Outcome

_outcomes: list[Outcome] = []


def check(argv: Sequence[str], conf: Path) -> None:
    """Compose and check every job of this command line; exits with one sentence and code 2 if one cannot be.

    Flags (--help, --cfg, ...) are Hydra's own business; only overrides are looked at.
    """
    if any(word in ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--version") for word in argv):
        return
    multirun = any(word in ("-m", "--multirun") for word in argv)
    overrides = [word for word in argv if not word.startswith("-")]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        for job in jobs(overrides, conf, multirun=multirun):
            load(job, conf)
    except UserError as error:
        sys.exit(_complain(error))


def jobs(overrides: Sequence[str], conf: Path, *, multirun: bool) -> list[list[str]]:
    """Override lists, one per job: the product of all sweeps; raises ConfigError, one sentence."""
    choices: list[list[str]] = []
    for override in _parse(_with_sweep_of_conf(overrides, conf)):
        if override.key_or_group.startswith("hydra"):
            continue
        if override.is_sweep_override():
            if not multirun:
                raise ConfigError(f"{override.input_line} names several values: add -m to run them all.")
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line or ""])
    return [list(job) for job in itertools.product(*choices)]


def load(overrides: Sequence[str], conf: Path) -> RunConfig:
    """The checked configuration that these overrides compose to; raises ConfigError, one sentence."""
    try:
        cfg = _compose(overrides, conf)
        config = parse(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)))
    except OmegaConfBaseException as error:
        raise ConfigError(_one_sentence(str(error))) from error
    check_given(config.task, {word.key_or_group: word.input_line or "" for word in _parse(overrides)})
    return config


def _compose(overrides: Sequence[str], conf: Path, *, hydra: bool = False) -> DictConfig:
    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            return compose("config", overrides=list(overrides), return_hydra_config=hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_sentence(str(error))) from error


def _with_sweep_of_conf(overrides: Sequence[str], conf: Path) -> list[str]:
    """`overrides`, and before them what an exp file sweeps over (hydra.sweeper.params) and they do not set."""
    parsed = _parse(overrides)
    plain = [override.input_line or "" for override in parsed if not override.is_sweep_override()]
    found = OmegaConf.select(_compose(plain, conf, hydra=True), "hydra.sweeper.params")
    given = {override.get_key_element() for override in parsed}
    return [*(f"{key}={values}" for key, values in (found or {}).items() if key not in given), *overrides]


def run_job(tree: dict[str, Any]) -> Outcome:
    """Run one composed configuration; a failed job is an outcome, so that a sweep goes on to its next one."""
    from kvtuner_sglang.tasks import run_task

    config = parse(tree)
    try:
        outcome = run_task(config, HydraConfig.get().overrides.task, _say)
    except UserError as error:
        _complain(error)
        outcome = Outcome(run_dir=config.run_dir, status="failed", skipped=False, reason=str(error))
    _outcomes.append(outcome)
    return outcome


def exit_code() -> int:
    """0 if every job of this process ended ok, else 1."""
    return int(any(outcome.status != "ok" for outcome in _outcomes))


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(_one_sentence(str(error))) from error


def _one_sentence(message: str) -> str:
    """Hydra's paragraphs as one sentence: the fault, then the options it lists."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    fault = re.sub(r"^In '[^']*': ", "", lines[0]).rstrip(".:")
    start = next((i for i, line in enumerate(lines) if line.startswith("Available options")), None)
    if start is not None:
        options = itertools.takewhile(lambda line: not line.startswith("Config search"), lines[start + 1 :])
        return f"{fault}: choose from {', '.join(options)}."
    key = next((line.partition(": ")[2] for line in lines if line.startswith("full_key: ")), None)
    if fault.startswith("Missing mandatory value") and key:
        return f"{key} has no default: give {key}=VALUE."
    if fault.startswith("Could not override"):
        return f"{fault}: no such option exists; python run.py --help lists them all."
    return f"{fault}."


@contextlib.contextmanager
def apart_from_the_running_job() -> Iterator[None]:
    """Within a job, which Hydra composed: other configurations can be composed in the block."""
    hydra = GlobalHydra.instance()
    running, hydra.hydra = hydra.hydra, None
    try:
        yield
    finally:
        hydra.hydra = running


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _complain(error: UserError) -> int:
    sys.stderr.write(f"kvtuner: {error}\n")
    sys.stderr.flush()
    return 2


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does: through every `finally` that stops servers."""
    raise KeyboardInterrupt
