"""The probe refuses a collapse in one sentence, passes what is fine, and asks once."""

import pytest
import torch

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.quality import probe as probe_module
from kvtuner_sglang.quality.probe import ensure_probed, probe, probe_file
from kvtuner_sglang.quality.stress import write_stress_copy
from kvtuner_sglang.quant import KVFormat, TensorFormat, uniform_plan

LAYERS = 3
KV4 = uniform_plan(KVFormat(TensorFormat(4, axis=1), TensorFormat(4)), LAYERS)
KV4_TOKEN = uniform_plan(KVFormat(TensorFormat(4), TensorFormat(4)), LAYERS)


class Bytes:
    """One token a byte: the tiny model has no tokenizer of its own."""

    def encode(self, text, add_special_tokens):
        return list(text.encode())


@pytest.fixture(autouse=True)
def _byte_tokens(monkeypatch):
    monkeypatch.setattr(probe_module, "load_tokenizer", lambda path: Bytes())


@pytest.fixture(scope="module")
def stressed(tiny_checkpoint, tmp_path_factory):
    return write_stress_copy(tiny_checkpoint, tmp_path_factory.mktemp("stress") / "copy")


def ask(folder, plan, page, cache, bound, said):
    return ensure_probed(
        model_name="tiny", model_path=folder, model_sha256="ab" * 32, plan_name="some", plan=plan, page_size=page,
        tokens=256, bound=bound, device="cpu", dtype=torch.float32, cache_dir=cache, say=said.append,
        measure=probe_module.probe,
    )


def test_it_separates_the_formats_of_a_model_with_outlier_keys(stressed):
    bad = probe(stressed, KV4_TOKEN, 1, 256, "cpu", torch.float32)
    good = probe(stressed, KV4, 64, 256, "cpu", torch.float32)
    assert bad.kl > 5 * good.kl > 0
    assert good.top1_agreement > bad.top1_agreement
    assert [kl for _, kl in bad.worst_layers] == sorted((kl for _, kl in bad.worst_layers), reverse=True)
    assert {layer for layer, _ in bad.worst_layers} == {0, 1, 2}


def test_refusal_names_the_kl_the_bound_and_the_worst_layers(stressed, tmp_path):
    result = probe(stressed, KV4_TOKEN, 1, 256, "cpu", torch.float32)
    with pytest.raises(UserError) as caught:
        ask(stressed, KV4_TOKEN, 1, tmp_path, result.kl / 2, [])
    sentence = str(caught.value)
    layer, kl = result.worst_layers[0]
    for part in ("tiny", "quant=some", f"{result.kl:.3f}", f"{layer} ({kl:.2g})", "quality.probe_bound"):
        assert part in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_what_passes_is_told_with_the_kl_the_bound_and_the_worst_layers(stressed, tmp_path):
    said: list[str] = []
    result = ask(stressed, KV4, 64, tmp_path, 9.0, said)
    layer, kl = result.worst_layers[0]
    for part in ("tiny with quant=some passes", f"{result.kl:.4f} is within the bound 9", f"{layer} ({kl:.2g})"):
        assert part in said[-1]
    assert said[-1].endswith(".")


def test_measured_once_for_a_model_and_plan_and_judged_by_the_bound_of_today(stressed, tmp_path, monkeypatch):
    said: list[str] = []
    first = ask(stressed, KV4, 64, tmp_path, 9.0, said)
    assert "once for this plan" in said[0]
    monkeypatch.setattr(probe_module, "probe", lambda *_: pytest.fail("measured again"))
    assert ask(stressed, KV4, 64, tmp_path, 9.0, said) == first
    with pytest.raises(UserError, match="over the bound 1e-09"):
        ask(stressed, KV4, 64, tmp_path, 1e-9, said)
    names = {probe_file(tmp_path, sha, plan, page, 256, device, dtype) for sha in ("a" * 64, "b" * 64)
             for plan, page in ((KV4, 64), (KV4, 128), (KV4_TOKEN, 1))
             for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16))}
    assert len(names) == 12


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"kl": 0.1}', '{"kl": 0.1, "worst_layers": 3}'])
def test_a_broken_cache_file_is_measured_again(stressed, tmp_path, broken):
    path = probe_file(tmp_path, "ab" * 32, KV4, 64, 256, "cpu", torch.float32)
    path.write_text(broken)
    said: list[str] = []
    assert ask(stressed, KV4, 64, tmp_path, 9.0, said).kl > 0
    assert "once for this plan" in said[0]


def test_tokens_that_read_nothing_stored_are_left_out(tiny_checkpoint):
    """The first page is exact, so with it the mean over two pages would be half of what it is."""
    one = probe(tiny_checkpoint, KV4, 64, 128, "cpu", torch.float32)
    assert one.tokens == 64
    assert one.kl > 1e-6


def test_a_probe_process_that_fails_or_dies_has_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"the probe's process died.*\.$"):
        probe_module.probe_in_own_process(tmp_path / "nothing", KV4, 64, 256, "cpu", torch.float32)


def test_an_interrupted_probe_leaves_no_process(tiny_checkpoint, monkeypatch):
    """What interrupts the wait for the answer reaches the caller at once."""
    import multiprocessing.connection

    def interrupt(_self):
        raise KeyboardInterrupt

    monkeypatch.setattr(multiprocessing.connection.Connection, "recv", interrupt)
    with pytest.raises(KeyboardInterrupt):
        probe_module.probe_in_own_process(tiny_checkpoint, KV4, 64, 256, "cpu", torch.float32)
    assert multiprocessing.active_children() == []
