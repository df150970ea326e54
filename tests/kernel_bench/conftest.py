"""A made-up run of task=kernels: its times are invented here, for tests, and none was measured."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kvtuner_sglang import command_line
from kvtuner_sglang.evidence.assemble import assemble
from kvtuner_sglang.evidence.record import Environment, write_record
from kvtuner_sglang.evidence.samples import SampleLog
from kvtuner_sglang.kernel_bench.cases import FLASHINFER, KVTUNER, PEERS, SHAPES, Storage, storage
from kvtuner_sglang.kernel_bench.metrics import figures
from kvtuner_sglang.kernel_bench.samples import (
    Ceilings,
    Check,
    DecodeTimes,
    LeftOut,
    Sample,
    StoreCheck,
    StoreTimes,
)

CONF = Path(__file__).parents[2] / "conf"
INVENTED_GPU = "NVIDIA Test Card 80GB"
READ = 3000.0


def decode_times(kernel: str, store: Storage, shape: str, batch: int, context: int, options: str,
                 share: float) -> DecodeTimes:
    """Five invented samples around `share` of the floor."""
    s, size = SHAPES[shape], store.decode_bytes(SHAPES[shape], [context] * batch)
    us = size / READ / 1e3 / share
    return DecodeTimes(kernel=kernel, format=store.name, options=options, key_axis=store.key_axis, shape=shape,
                       q_heads=s.q_heads, kv_heads=s.kv_heads, head_dim=s.head_dim, page=store.page, batch=batch,
                       context=context, layers=2, steps=20, bytes=size,
                       us=tuple(us * x for x in (1.02, 0.99, 1.0, 1.01, 0.98)),
                       plan_us=(2.0, 2.1, 2.2) if kernel == KVTUNER else ())


def invented_samples() -> list[Sample]:
    samples: list[Sample] = [Ceilings(2900.0, READ), Check(KVTUNER, "kv4", "qwen2_5_7b", 2e-3, 2e-3),
                             StoreCheck("kv4", "qwen2_5_7b", "extend", ()),
                             StoreTimes("kv4", "qwen2_5_7b", "extend", 8192, 2, 20_000_000, (9.0, 10.0, 11.0)),
                             StoreTimes("kv4", "qwen2_5_7b", "step", 64, 28, 600_000, (6.0, 6.0, 6.0)),
                             LeftOut("28/4/128 64 x 131072", "it takes 90 GiB")]
    for shape in ("qwen2_5_7b", "qwen2_5_0_5b"):
        for batch in (1, 16):
            for context in (1024, 32768):
                samples += [decode_times(KVTUNER, storage(name), shape, batch, context, "", 0.8)
                            for name in ("kv8", "kv4", "kv2", "kv4_token")]
                for kernel, store in PEERS:
                    for options, share in (("graph plan", 0.8), ("exact plan", 0.9)) if kernel == FLASHINFER else (
                            ("", 0.6),):
                        samples.append(decode_times(kernel, store, shape, batch, context, options, share))
    return samples


@pytest.fixture
def invented_run(tmp_path) -> Callable[..., Path]:
    """invented_run(status="ok") -> the run's directory under tmp_path."""

    def write(status: str = "ok") -> Path:
        config = command_line.load([f"runs_dir={tmp_path / 'runs'}", "task=kernels", "tracking=disabled"], CONF)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        samples = invented_samples()
        with SampleLog(config.run_dir) as log:
            for sample in samples:
                log.append(sample)
        unknown = dict.fromkeys(("gpu_driver", "gpu_clocks", "gpu_topology", "cuda"), "invented for a test")
        environment = Environment(
            host="test-host", os="Linux", python="3.11.1", git_sha="a" * 40, git_dirty=False, lock_file="gpu.txt",
            lock_sha256="b" * 64, packages={"sglang": "0.5.17"}, cpu="Test CPU", cpu_cores=2, ram_mib=1000,
            gpus=(INVENTED_GPU,), unknown=unknown, **dict.fromkeys(unknown))
        ok = status == "ok"
        write_record(config.run_dir, assemble(
            config, overrides=["task=kernels"], started="2026-01-02T03:04:05+00:00", status=status,
            reason=None if ok else "the peer flashinfer cannot run here.", environment=environment,
            samples=log.summary(), group=None, figures=figures(samples) if ok else None))
        return config.run_dir

    return write
