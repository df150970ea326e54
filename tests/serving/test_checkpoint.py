"""From a model's name to a checkpoint folder: the real SmolLM2 conversion, local folders, and what is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvtuner_sglang.errors import UserError
from kvtuner_sglang.serving import cache_folder, checkpoint
from kvtuner_sglang.serving.cache_folder import cached_sha256, one_at_a_time
from kvtuner_sglang.serving.checkpoint import SMOLLM2, SMOLLM2_SHA256, Checkpoint, prepare_checkpoint

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    """The real one, from the user's own cache: converted by whichever run or test comes first."""
    return prepare_checkpoint(SMOLLM2, None)


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KVTUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path) -> Path:
    """A checkpoint of 8,256 bfloat16-free elements in two files, as large models are saved."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(SHAPE))
    save_file({"embed": np.zeros((128, 64), np.float32)}, made / "model-1.safetensors")
    save_file({"norm": np.ones(64, np.float16)}, made / "model-2.safetensors")
    index = {"weight_map": {"embed": "model-1.safetensors", "norm": "model-2.safetensors"}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


def refused(source: str, path: str | Path | None) -> str:
    """The one sentence with which a source is refused."""
    with pytest.raises(UserError) as refusal:
        prepare_checkpoint(source, None if path is None else str(path))
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_smollm2_has_its_shape_and_the_ggufs_checksum(smollm2: Checkpoint) -> None:
    assert dataclasses.replace(smollm2, path=Path()) == Checkpoint(
        path=Path(), source=SMOLLM2, sha256=SMOLLM2_SHA256, architecture="LlamaForCausalLM", layers=30, q_heads=9,
        kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536, vocab_size=49152, dtype_name="float32",
        parameters=134_515_008 + 49152 * 576,
    )  # fmt: skip
    assert smollm2.sha256.startswith("b179c952")
    assert smollm2.sha256.endswith("110db53")


def test_smollm2_is_untied_with_an_lm_head_equal_to_its_embedding(smollm2: Checkpoint) -> None:
    weights = load_file(smollm2.path / "model.safetensors")
    assert len(weights) == 273
    np.testing.assert_array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert json.loads((smollm2.path / "config.json").read_text())["tie_word_embeddings"] is False


def test_smollm2_weights_are_the_ggufs_dequantized(smollm2: Checkpoint) -> None:
    """Against a second way: gguf's own dequantization, without transformers."""
    from gguf import GGUFReader, dequantize

    weights = load_file(smollm2.path / "model.safetensors")
    reader = GGUFReader(checkpoint._smollm2_gguf())  # noqa: SLF001 (which file is the point)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = {"blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight", "output_norm.weight": "model.norm.weight",
             "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight"}  # fmt: skip
    for stored, loaded in names.items():
        tensor = tensors[stored]
        np.testing.assert_array_equal(dequantize(tensor.data, tensor.tensor_type), weights[loaded])


def test_smollm2s_tokenizer_ends_where_the_model_does(smollm2: Checkpoint) -> None:
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "text = 'The code is 4821, don\\'t stop.\\n\\n  Zoë'\n"
        "assert t.decode(t(text).input_ids) == text\n"
        "print(t.eos_token, t.pad_token, t.convert_ids_to_tokens(t('a 4821').input_ids)[-4:])"
    )
    done = subprocess.run([sys.executable, "-c", code, smollm2.path], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "<|im_end|> <|im_end|> ['4', '8', '2', '1']"


def test_a_second_call_converts_nothing(smollm2: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_convert", lambda *ignored: pytest.fail("converted again"))
    assert prepare_checkpoint(SMOLLM2, None, say=lambda text: pytest.fail(text)) == smollm2


@pytest.mark.parametrize("damage", ["manifest", "weights", "version"])
def test_a_conversion_that_is_not_whole_or_not_of_now_does_not_count(
    smollm2: Checkpoint, own_cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    copy = own_cache / "models" / smollm2.path.name
    shutil.copytree(smollm2.path, copy, copy_function=shutil.copy2 if damage == "weights" else _copy_small)
    if damage == "manifest":
        (copy / checkpoint.MANIFEST).unlink()
    elif damage == "version":
        monkeypatch.setattr(checkpoint, "CONVERSION_VERSION", checkpoint.CONVERSION_VERSION + 1)
    else:
        with (copy / "model.safetensors").open("r+b") as stream:
            stream.truncate(1000)
    converted: list[Path] = []
    monkeypatch.setattr(checkpoint, "_convert", lambda source, into, manifest: converted.append(into))
    said: list[str] = []
    try:
        prepare_checkpoint(SMOLLM2, None, say=said.append)
    except UserError:
        assert damage == "weights"  # nothing was really converted, so they are still cut off
    assert converted == [copy]
    assert len(said) == 1
    assert "half a minute" in said[0]


def _copy_small(source: str, target: str) -> None:
    """The weights as a hard link or a sparse file of their size would be read; a link needs no 650 MB."""
    Path(target).symlink_to(source)


def test_a_damaged_wheel_is_refused(own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = tmp_path / "SmolLM2.gguf"
    bad.write_bytes(b"GGUF")
    monkeypatch.setattr(checkpoint, "_smollm2_gguf", lambda: bad)
    assert "is damaged (sha256 " in refused(SMOLLM2, None)
    assert not (own_cache / "models").exists()


def test_a_conversion_that_fails_leaves_nothing(own_cache: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    models = cache_folder.cache_folder("models")
    with pytest.raises(UserError, match=r"could not be converted into .*: \w+"):
        checkpoint._convert(bad, models / "bad", {})  # noqa: SLF001
    assert list(models.iterdir()) == []


def test_a_local_folder_is_read_from_its_own_files(folder: Path) -> None:
    found = prepare_checkpoint("path", str(folder))
    parts = [cached_sha256(folder / f"model-{n}.safetensors") for n in (1, 2)]
    listing = f"{parts[0]}  model-1.safetensors\n{parts[1]}  model-2.safetensors\n"
    summed = subprocess.run(["sha256sum"], input=listing, check=True, capture_output=True, text=True).stdout.split()[0]
    assert found == Checkpoint(
        path=folder, source="path", sha256=summed, architecture="LlamaForCausalLM", layers=2, q_heads=4, kv_heads=2,
        head_dim=16, hidden_size=64, intermediate_size=96, vocab_size=128, dtype_name="float32", parameters=8256,
    )  # fmt: skip


def test_what_is_no_checkpoint_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    assert "give model.path=" in refused("path", None)
    assert f"There is no folder {tmp_path}/absent" in refused("path", tmp_path / "absent")
    assert "has no config.json" in refused("path", tmp_path)

    (folder / "model-2.safetensors").rename(tmp_path / "elsewhere")
    assert "lacks model-2.safetensors" in refused("path", folder)
    (folder / "model.safetensors.index.json").unlink()
    with (folder / "model-1.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    assert "is cut off" in refused("path", folder)
    (folder / "model-1.safetensors").write_text("version https://git-lfs.github.com/spec/v1 and so on")
    assert "not a safetensors file" in refused("path", folder)
    (folder / "model-1.safetensors").unlink()
    assert "has no *.safetensors weights" in refused("path", folder)

    (folder / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": None}))
    assert "does not say vocab_size" in refused("path", folder)
    (folder / "config.json").write_text("{")
    assert "cannot be read" in refused("path", folder)


@pytest.mark.parametrize("source", ["no-such-organisation/no-such-model", "not a hub id!", "pypi:numpy"])
def test_what_is_not_on_this_machine_is_refused(own_cache: Path, source: str) -> None:
    assert source in refused(source, None)


def test_a_cache_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVTUNER_CACHE", str(tmp_path / "file" / "below"))
    assert "set KVTUNER_CACHE to a folder that can" in refused(SMOLLM2, None)


def test_the_cache_goes_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KVTUNER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder.cache_folder("x") == tmp_path / "home" / ".cache" / "kvtuner-sglang" / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder.cache_folder("x") == tmp_path / "xdg" / "kvtuner-sglang" / "x"
    monkeypatch.setenv("KVTUNER_CACHE", str(tmp_path / "own"))
    assert cache_folder.cache_folder("x") == tmp_path / "own" / "x"


def test_a_checksum_is_kept_until_the_file_changes(own_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = cached_sha256(file)
    (note,) = (own_cache / "sha256").iterdir()
    note.write_text("kept")
    assert cached_sha256(file) == "kept"
    file.write_bytes(b"three")
    assert cached_sha256(file) not in (first, "kept")


def test_only_one_converts_at_a_time(tmp_path: Path) -> None:
    waited, order = threading.Event(), []

    def second() -> None:
        with one_at_a_time(tmp_path / "turn", waited.set):
            order.append("second")

    with one_at_a_time(tmp_path / "turn", lambda: pytest.fail("nobody was before")):
        other = threading.Thread(target=second)
        other.start()
        assert waited.wait(10)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


def test_the_tokenizer_of_random_weights_has_a_word_for_every_id(monkeypatch, tmp_path) -> None:
    from transformers import AutoTokenizer

    from kvtuner_sglang.serving.dummy_checkpoint import SPACE

    monkeypatch.setenv("KVTUNER_CACHE", str(tmp_path))
    checkpoint = prepare_checkpoint("dummy:tiny", None)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    assert len(tokenizer) == checkpoint.vocab_size
    assert tokenizer.encode("Hi, you") == tokenizer.convert_tokens_to_ids(["H", "i", ",", SPACE, "y", "o", "u"])
    assert tokenizer.decode(tokenizer.encode("Hi, you")) == "Hi, you"
    assert tokenizer.decode([0, 170, 2047]) == "t0t170t2047"
    assert all(tokenizer.decode([n]) for n in range(checkpoint.vocab_size))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
