"""The Gluon kernel compiles for Hopper without a GPU.

That is more than syntax: every layout conversion in it asserts that no data moves between lanes (hopper_operands.py),
so a wrong fragment order does not compile.
"""

import subprocess
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource

from kvtuner_triton.decode_hopper import decode_kernel

# key bits, boosted, value bits, head_dim, page, tokens a step
SHAPES = ((4, True, 4, 128, 64, 64), (4, True, 4, 64, 128, 32), (8, False, 2, 64, 128, 32))


def ptx_for_hopper(key_bits: int, boosted: bool, value_bits: int, head_dim: int, page: int, step: int) -> str:
    constants = {"KV_HEADS": 4, "GROUP": 7, "D": head_dim, "PAGE": page, "KEY_BITS": key_bits,
                 "KEY_META": 2, "VALUE_BITS": value_bits, "VALUE_META": 1, "BOOSTED": boosted, "T": step,
                 "STAGES": 2, "OVERLAP": False}
    if not boosted:
        constants["key_extra"] = None
    types = {"q_ptr": "*bf16", "tail_key": "*bf16", "tail_value": "*bf16", "partial": "*fp32", "lse": "*fp32",
             "sm_scale": "fp32", "batch": "i32", "table_stride": "i32"}
    names = decode_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = GluonASTSource(decode_kernel, signature, constants, aligned)
    return compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]


def test_the_fragment_kernel_compiles_for_hopper():
    """In a process of its own: when one that compiled ends, the compiler's bindings print pages about themselves."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    for shape in SHAPES:
        ptx = ptx_for_hopper(*shape)
        assert "mma.sync.aligned.m16n8k16" in ptx
        assert ".local" not in ptx  # no array of a lane's lives in memory
