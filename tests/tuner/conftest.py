"""The tiny model of the quality tests, and a whole run of task=tune on it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvtuner_sglang import command_line
from kvtuner_sglang.tasks import tune
from tiny_llama import tiny_checkpoint, tiny_model, tokens

__all__ = ["tiny_checkpoint", "tiny_model", "tokens"]
CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """For a tiny model several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def byte_checkpoint(tiny_checkpoint):
    """The tiny model with a tokenizer: a token is a byte."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tiny_checkpoint)
    return tiny_checkpoint


@pytest.fixture(scope="session")
def run_tune(byte_checkpoint) -> Callable[..., list[str]]:
    """run_tune(folder, *overrides) -> what was said; the run's directory is the only one in folder/runs."""

    def run(folder: Path, *overrides: str) -> list[str]:
        words = ["task=tune", "tune=tiny", "tune.page_size=64", "model=local", "model.name=tiny",
                 f"model.path={byte_checkpoint}", f"runs_dir={folder / 'runs'}", "tracking=disabled",
                 "server.device=cpu", *overrides]
        said: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KVTUNER_CACHE", str(folder / "cache"))
            tune.run(command_line.load(words, CONF), words, said.append)
        return said

    return run


@pytest.fixture(scope="session")
def finished_run(run_tune, tmp_path_factory) -> Path:
    """The directory of a finished run."""
    folder = tmp_path_factory.mktemp("tune")
    run_tune(folder)
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir
