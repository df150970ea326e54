"""The kernels compile for Hopper, and those that other cards run for them too, without a GPU.

For the Gluon kernel that is more than syntax: every layout conversion in it asserts that no data moves between lanes
(hopper_operands.py), so a wrong fragment order does not compile.
"""

import subprocess
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource

from kvtuner_triton import store, unpack
from kvtuner_triton.decode_hopper import decode_kernel
from kvtuner_triton.prefix import PrefixTuning, prefix_kernel, prefix_tuning

# key bits, boosted, value bits, head_dim, page, tokens a step
SHAPES = ((4, True, 4, 128, 64, 64), (4, True, 4, 64, 128, 32), (8, False, 2, 64, 128, 32))
FORMATS = ((4, 4, 128, 64, True), (4, 8, 64, 128, True), (2, 4, 128, 128, False))  # key and value bits, .., boosted
# key bits, boosted, value bits, dtype, sm
STORES = ((4, True, 8, "bf16", 90), (4, False, 2, "fp16", 90), (4, True, 4, "fp32", 90), (4, True, 4, "bf16", 80),
          (8, False, 8, "bf16", 90), (2, False, 2, "fp16", 90))
TILES = ((4, 64, 128, "bf16"), (7, 64, 128, "bf16"), (1, 128, 64, "fp16"), (2, 0, 128, "bf16"), (1, 64, 128, "fp32"))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def ptx_of(kernel, constants: dict, types: dict[str, str], warps: int, stages: int = 2,
           source: type = ASTSource, sm: int = 90) -> str:
    """types: of what is not a constant nor *i32; pointers and the strides of rows are multiples of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if signature[name].startswith("*") or (name.endswith("_stride") and name != "table_stride")}
    options = {"num_warps": warps, "num_stages": stages}
    return compile_kernel(source(kernel, signature, constants, aligned), target=GPUTarget("cuda", sm, 32),
                          options=options).asm["ptx"]


def typed(**names: str) -> dict[str, str]:
    """typed(u8="a b") = {"a": "*u8", "b": "*u8"}; i32 and fp32 scalars are written i32_, fp32_."""
    return {name: kind[:-1] if kind.endswith("_") else f"*{kind}" for kind, x in names.items() for name in x.split()}


def decode_ptx(key_bits: int, boosted: bool, value_bits: int, head_dim: int, page: int, step: int) -> str:
    constants = {"KV_HEADS": 4, "GROUP": 7, "D": head_dim, "PAGE": page, "KEY_BITS": key_bits,
                 "KEY_META": 2, "VALUE_BITS": value_bits, "VALUE_META": 1, "BOOSTED": boosted, "T": step,
                 "STAGES": 2}
    if not boosted:
        constants["key_extra"] = None
    types = typed(bf16="q_ptr tail_key tail_value", fp32="partial lse", fp32_="sm_scale", i32_="batch table_stride")
    return ptx_of(decode_kernel, constants, types, 1, source=GluonASTSource)


def store_ptx(key_bits: int, boosted: bool, value_bits: int, dtype: str, sm: int, head_dim: int, page: int,
              decode: bool) -> str:
    constants = {"KV_HEADS": 4, "D": head_dim, "PAGE": page, "TOKENS": page * 64 // head_dim, "KEY_BITS": key_bits,
                 "KEY_META": 2, "VALUE_BITS": value_bits, "VALUE_META": 1, "GROUP": 7 if boosted else 0,
                 "SM90": sm >= 90}
    if not boosted:
        constants |= {"q": None, "key_extra": None}
    types = {name: f"*{dtype}" for name in ("q", "key", "value", "tail_key", "tail_value")}
    types |= typed(u8="key_codes key_extra value_codes", fp16="key_meta value_meta", i64="slots seq_lens",
                   i32_="q_stride key_stride value_stride table_stride")
    kernel, warps = (store.step_kernel, store.STEP_WARPS) if decode else (store.extend_kernel, store.EXTEND_WARPS)
    return ptx_of(kernel, constants, types, warps * page // 64, sm=sm)


UNPACKED = typed(bf16="key_out value_out", u8="key_codes value_codes extra", fp16="key_meta value_meta",
                 i32_="table_stride")


def unpack_ptx(key_bits: int, value_bits: int, head_dim: int, page: int, boost: bool) -> str:
    constants = {"KV_HEADS": 4, "D": head_dim, "PAGE": page, "KEY_BITS": key_bits, "KEY_META": 2,
                 "VALUE_BITS": value_bits, "VALUE_META": 1, "BOOST": boost} | ({} if boost else {"extra": None})
    return ptx_of(unpack.page_kernel, constants, UNPACKED, page // 16)


def unpack_token_ptx(key_bits: int, value_bits: int, head_dim: int, page: int) -> str:
    constants = {"KV_HEADS": 4, "D": head_dim, "PAGE": page, "KEY_BITS": key_bits, "KEY_GROUPS": 1, "KEY_META": 2,
                 "VALUE_BITS": value_bits, "VALUE_GROUPS": 2, "VALUE_META": 1, "T": unpack.BLOCK}
    return ptx_of(unpack.token_kernel, constants, UNPACKED, 4)


def prefix_ptx(group: int, page: int, head_dim: int, dtype: str) -> str:
    tuning: PrefixTuning = prefix_tuning(group, page or None, DTYPES[dtype])
    constants = {"KV_HEADS": 4, "GROUP": group, "D": head_dim, "PAGE": page, "TOKENS": tuning.tokens,
                 "PACK": tuning.heads, "N": tuning.columns} | ({} if page else {"tail_key": None, "tail_value": None})
    types = {name: f"*{dtype}" for name in ("q", "k", "v", "out", "tail_key", "tail_value", "scratch_key",
                                            "scratch_value")}
    types |= typed(i32_="q_stride k_stride v_stride out_stride", fp32_="log2_scale")
    return ptx_of(prefix_kernel, constants, types, tuning.warps, tuning.stages)


def test_the_kernels_compile_for_hopper():
    """In a process of its own: when one that compiled ends, the compiler's bindings print pages about themselves."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    # As beside SGLang, whose srt/utils/common.py puts a plain function there: no kernel may call such a one.
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    for shape in SHAPES:
        ptx = decode_ptx(*shape)
        assert "mma.sync.aligned.m16n8k16" in ptx
        assert ".local" not in ptx  # no array of a lane's lives in memory
    for i, fmt in enumerate(STORES):
        ptx = store_ptx(*fmt, *((128, 64) if i < 4 else (64, 128)), decode=i % 2 == 1)
        assert "ld.global.v4.b32" in ptx or fmt[3] == "fp32"
        assert ("min.u16x2" in ptx) == (fmt[4] >= 90)
    for fmt in FORMATS:
        ptx = unpack_ptx(*fmt)
        assert "ld.global.v4.b32" in ptx  # codes, 16 bytes a lane
        assert "st.global.v4.b32" in ptx
    for bits in ((4, 4), (8, 2)):
        unpack_token_ptx(*bits, 128, 1)
    for tile in TILES:
        ptx = prefix_ptx(*tile)
        assert ("wgmma.mma_async" in ptx) == (tile[-1] != "fp32")
        assert "cp.async.cg" in ptx or tile[-1] == "fp32"  # loads run ahead, 16 bytes each
        assert "ld.global.b16" not in ptx
