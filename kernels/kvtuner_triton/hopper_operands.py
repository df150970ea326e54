"""Device functions (Gluon) that turn what a lane has loaded into MMA operands, without moving anything between lanes.

Every layout here follows fragments.py.  A reshape or permute only renames registers, and `assert_trivial` makes the
compiler refuse a conversion that would move data.

Codes become fp16 by masking alone: an fp16 whose exponent bits are zero is subnormal, so the bit pattern c << s, with
c < 2^(10 - s), *is* the number c * 2^(s - 24), exactly, and tensor cores multiply subnormals exactly (Fasi et al.,
"Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021).  Unlike the usual 1024 + c there is no offset to take off.
The factor 2^-24 is undone in fp32 after the product, the factor 2^s of field f in the other operand (`field_factor`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

CODE_UNIT = gl.constexpr(2.0**24)  # what a product with subnormal codes has to be multiplied by

# Two 16-bit units of codes in, two fp16 out of each field: byte 0 of a unit is half 0, byte 1 is half 1.
UNPACK_8 = gl.constexpr("""{
    prmt.b32 $0, $2, 0, 0x4240;
    prmt.b32 $1, $2, 0, 0x4341;
}""")
UNPACK_4 = gl.constexpr("""{
    .reg .b32 h;
    shr.u32 h, $4, 8;
    and.b32 $0, $4, 0x000f000f;
    and.b32 $1, $4, 0x00f000f0;
    and.b32 $2, h, 0x000f000f;
    and.b32 $3, h, 0x00f000f0;
}""")
UNPACK_2 = gl.constexpr("""{
    .reg .b32 h;
    shr.u32 h, $8, 8;
    and.b32 $0, $8, 0x00030003;
    and.b32 $1, $8, 0x000c000c;
    and.b32 $2, $8, 0x00300030;
    and.b32 $3, $8, 0x00c000c0;
    and.b32 $4, h, 0x00030003;
    and.b32 $5, h, 0x000c000c;
    and.b32 $6, h, 0x00300030;
    and.b32 $7, h, 0x00c000c0;
}""")

# Two 16-bit units of slots in, nibbles 0..3 of both out.
UNPACK_SLOTS = gl.constexpr("""{
    .reg .b32 a, b, c;
    shr.u32 a, $4, 4;
    shr.u32 b, $4, 8;
    shr.u32 c, $4, 12;
    and.b32 $0, $4, 0x000f000f;
    and.b32 $1, a, 0x000f000f;
    and.b32 $2, b, 0x000f000f;
    and.b32 $3, c, 0x000f000f;
}""")
# Two scales in; out: 16 |s| where the sign bit is set, else s; and |s| where it is set, else 0.  16 |s| = s + 17 |s|.
SPLIT_SCALES = gl.constexpr("""{
    .reg .b32 n, z;
    mov.b32 z, 0;
    neg.f16x2 n, $2;
    max.f16x2 $1, n, z;
    mov.b32 z, 0x4c404c40;
    fma.rn.f16x2 $0, $1, z, $2;
}""")
SWAP = gl.constexpr("""{
    .reg .pred p;
    setp.ne.b32 p, $4, 0;
    selp.b32 $0, $3, $2, p;
    selp.b32 $1, $2, $3, p;
}""")


@gluon.constexpr_function
def accumulator():
    """The result of an MMA, (16 rows, 8 columns) a tile: lane (g, t) has rows g, 8 + g, columns 2t, 2t + 1."""
    return gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])


@gluon.constexpr_function
def operand_a():
    return gl.DotOperandLayout(0, accumulator(), 2)


@gluon.constexpr_function
def operand_b():
    return gl.DotOperandLayout(1, accumulator(), 2)


@gluon.constexpr_function
def powers(start, stop):
    """start, 2 start, ... below stop."""
    out = []
    while start < stop:
        out.append(start)
        start *= 2
    return out


@gluon.constexpr_function
def linear(reg, lane, shape):
    return gl.DistributedLinearLayout(reg, lane, [], [], shape)


@gluon.constexpr_function
def query_layout(D):
    """(8 heads, D channels): lane (g, t) has head g, channels D/4 t .. D/4 (t + 1)."""
    reg = [[0, c] for c in powers(1, D // 4)]
    return linear(reg, [[0, D // 4], [0, D // 2], [1, 0], [2, 0], [4, 0]], [8, D])


@gluon.constexpr_function
def channel_pair_layout(D):
    """(D/2 words of two fp16) of one value a channel: lane (g, t) has the words of channels D/4 t .. D/4 (t + 1)."""
    return linear([[c] for c in powers(1, D // 8)], [[D // 8], [D // 4], [0], [0], [0]], [D // 2])


@gluon.constexpr_function
def slot_pair_layout(T, D):
    """(T/32 tiles, 8 g, D/32 words of two slots) flat: lane (g, t) has the words of its 64 channels, of tokens 4 g.."""
    width = D // 32
    lane = [[0], [2 if D == 128 else 0], [width], [2 * width], [4 * width]]
    return linear([[1]] + [[t] for t in powers(8 * width, T * D // 128)], lane, [T * D // 128])


@gluon.constexpr_function
def slot_layout(T, D):
    """(T row order, 2 u, parts, lane quads a part, 2 e): the A operand (T, 16) of second halves, columns apart."""
    reg = [[0, 0, 0, 0, 1], [8, 0, 0, 0, 0], [0, 1, 0, 0, 0]] + [[r, 0, 0, 0, 0] for r in powers(16, T)]
    quads = [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0] if D == 128 else [0, 0, 0, 2, 0]]
    rows = [[1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]]
    return linear(reg, quads + rows, [T, 2, D // 64, 256 // D, 2])


@gluon.constexpr_function
def slot_sum_layout():
    """(8 heads, 4 t, 2 e): lane (g, t) has head g, quad t."""
    return linear([[0, 0, 1]], [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]], [8, 4, 2])


@gluon.constexpr_function
def token_layout(T):
    """(T tokens): lane (g, t) has tokens 32 tile + 4 g + 0..3."""
    return linear([[1], [2]] + [[t] for t in powers(32, T)], [[0], [0], [4], [8], [16]], [T])


@gluon.constexpr_function
def token_pair_layout(T):
    """(T/2 words of two fp16) of one value a token, held like token_layout(T)."""
    return linear([[1]] + [[t] for t in powers(16, T // 2)], [[0], [0], [2], [4], [8]], [T // 2])


@gluon.constexpr_function
def plain_key_layout(D):
    """(32 tokens, D channels) in memory order, held as a K fragment: tokens 4 g + 0..3, channels D/4 t + .. ."""
    reg = [[0, c] for c in powers(1, D // 4)] + [[1, 0], [2, 0]]
    return linear(reg, [[0, D // 4], [0, D // 2], [4, 0], [8, 0], [16, 0]], [32, D])


@gluon.constexpr_function
def plain_value_layout(D):
    """(32 tokens, D channels) in memory order, held as a V fragment: tokens 8 t + 0..7, channels D/8 g + .. ."""
    reg = [[0, c] for c in powers(1, D // 8)] + [[1, 0], [2, 0], [4, 0]]
    return linear(reg, [[8, 0], [16, 0], [0, D // 8], [0, D // 4], [0, D // 2]], [32, D])


@gluon.constexpr_function
def output_layout(D):
    """(8 heads, D channels) of the accumulator: lane (g, t) has heads 2t, 2t+1, channels D/8 g .. D/8 (g + 1)."""
    reg = [[0, c] for c in powers(1, D // 8)] + [[1, 0]]
    return linear(reg, [[2, 0], [4, 0], [0, D // 8], [0, D // 4], [0, D // 2]], [8, D])


@gluon.jit
def split_words(words):
    """(n) int32 -> (2 n) int16 in memory order."""
    return gl.join(words.to(gl.int16), (words >> 16).to(gl.int16)).reshape([words.shape[0] * 2])


@gluon.jit
def halves(words):
    """(n) int32 -> (2 n) fp16 in memory order."""
    return split_words(words).to(gl.float16, bitcast=True)


@gluon.jit
def repeat_rows(x, T: gl.constexpr):
    """Accumulator (16, 8) whose rows are equal -> (T, 8)."""
    x = gl.join(x, x)
    if T == 64:  # noqa: SIM108
        x = gl.join(x, x).permute([3, 2, 0, 1])
    else:
        x = x.permute([2, 0, 1])
    return gl.convert_layout(x.reshape([T, 8]), accumulator(), assert_trivial=True)


@gluon.jit
def unpack(words, BITS: gl.constexpr):
    """(n) int32 words of codes -> (2 n, per, half) fp16, code * 2^(f * BITS - 24) for field f."""
    units = split_words(words)
    if BITS == 8:
        a, b = gl.inline_asm_elementwise(UNPACK_8, "=r,=r,r", [units], dtype=(gl.float16, gl.float16), is_pure=True,
                                         pack=2)
        x = gl.join(a, b)
    elif BITS == 4:
        a, b, c, d = gl.inline_asm_elementwise(
            UNPACK_4, "=r,=r,=r,=r,r", [units], dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True,
            pack=2)
        x = gl.join(gl.join(a, b), gl.join(c, d))
    else:
        f = gl.inline_asm_elementwise(
            UNPACK_2, "=r,=r,=r,=r,=r,=r,=r,=r,r", [units],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True, pack=2)
        low = gl.join(gl.join(f[0], f[1]), gl.join(f[2], f[3]))
        high = gl.join(gl.join(f[4], f[5]), gl.join(f[6], f[7]))
        x = gl.join(low, high).permute([0, 2, 1, 3])  # unit, f // 2, f mod 2, half
    return x.reshape([units.shape[0], 8 // BITS, 2])


@gluon.jit
def key_operand(words, T: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr):
    """The words of T tokens of packed keys -> A operand (T, D)."""
    x = unpack(words, BITS).reshape([T // 32, D * BITS // 128, 8, 4, 2, 2, 2, 8 // BITS, 2])
    x = x.permute([0, 5, 8, 2, 1, 4, 7, 3, 6])  # tile, m, half, g | chunk, u // per low, f, t, e
    return gl.convert_layout(x.reshape([T, D]), operand_a(), assert_trivial=True)


@gluon.jit
def value_operand(words, T: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr):
    """The words of T tokens of packed values -> A operand (D, T)."""
    x = unpack(words, BITS).reshape([T // 32, BITS // 2, D // 64, 8, 4, 4, 2, 8 // BITS, 2])
    x = x.permute([2, 5, 8, 3, 0, 1, 7, 4, 6])  # m high, m low, half, g | tile, u // per, f, t, e
    return gl.convert_layout(x.reshape([D, T]), operand_a(), assert_trivial=True)


@gluon.jit
def channel_operand(x, D: gl.constexpr):
    """(8 heads, D channels) -> B operand (D, 8), channels in the column order of `key_operand`."""
    x = x.reshape([8, 4, D // 8, 2]).permute([2, 1, 3, 0])  # u, t, e | head
    return gl.convert_layout(x.reshape([D, 8]), operand_b(), assert_trivial=True)


@gluon.jit
def split_scales(scale):
    """Signed scales (D) fp16 -> what first halves, or whole codes, and what second halves are multiplied by."""
    return gl.inline_asm_elementwise(SPLIT_SCALES, "=r,=r,r", [scale], dtype=(gl.float16, gl.float16), is_pure=True,
                                     pack=2)


@gluon.jit
def slot_factors(q, scale, D: gl.constexpr):
    """q (8 heads, D) fp16, scale (D) of second halves -> B operand (16, 8): one row a lane quad and slot.

    Row 8 u + 2 t + e is the sum of q scale over the channels of slot 2 u + e that quad t has.  A boosted channel is in
    one quad, so the sum over quads of rows times second halves is exact but for one rounding of q scale to fp16.
    """
    scale, _ = gl.broadcast(scale[None, :], q)
    low, high = sum_pairs(q.reshape([8, 4, D // 16, 2, 2]), scale.reshape([8, 4, D // 16, 2, 2]))
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, slot_sum_layout())))
    other = t // (128 // D) % 2  # a quad with channels c % 64 >= 32 has them in slots c % 4 ^ 2
    other, _ = gl.broadcast(other.to(gl.int16)[None, :, None], low)
    low, high = gl.inline_asm_elementwise(SWAP, "=r,=r,r,r,r", [low, high, other], dtype=(gl.float16, gl.float16),
                                          is_pure=True, pack=2)
    x = gl.join(low, high).permute([3, 1, 2, 0])  # u, t, e | head
    return gl.convert_layout(x.reshape([16, 8]), operand_b(), assert_trivial=True)


@gluon.jit
def sum_pairs(q, scale):
    """(8, 4, n, 2, 2) twice -> sums of products over n of pair 0 and of pair 1, (8, 4, 2) each."""
    n: gl.constexpr = q.shape[2]
    low = gl.zeros([8, 4, 2], gl.float16, layout=slot_sum_layout())
    high = gl.zeros([8, 4, 2], gl.float16, layout=slot_sum_layout())
    return add_pairs(q, scale, low, high, n)


@gluon.jit
def add_pairs(q, scale, low, high, N: gl.constexpr):
    """Halve N until one product of each pair is left: an HFMA2 each, where a sum over N would multiply, then add."""
    if N == 1:
        q_low, q_high = gl.split(q.reshape([8, 4, 2, 2]).permute([0, 1, 3, 2]))
        scale_low, scale_high = gl.split(scale.reshape([8, 4, 2, 2]).permute([0, 1, 3, 2]))
        low = fma_pairs(q_low, scale_low, low)
        high = fma_pairs(q_high, scale_high, high)
    else:
        q_a, q_b = gl.split(q.reshape([8, 4, 2, N // 2, 2, 2]).permute([0, 1, 3, 4, 5, 2]))
        scale_a, scale_b = gl.split(scale.reshape([8, 4, 2, N // 2, 2, 2]).permute([0, 1, 3, 4, 5, 2]))
        low, high = add_pairs(q_a, scale_a, low, high, N // 2)
        low, high = add_pairs(q_b, scale_b, low, high, N // 2)
    return low, high


@gluon.jit
def fma_pairs(x, y, z):
    """x y + z in fp16, in z's layout."""
    x = gl.convert_layout(x, slot_sum_layout(), assert_trivial=True)
    y = gl.convert_layout(y, slot_sum_layout(), assert_trivial=True)
    return gl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], dtype=gl.float16,
                                     is_pure=True, pack=2)


@gluon.jit
def slot_operand(words, T: gl.constexpr, D: gl.constexpr):
    """The words of second halves of T tokens -> A operand (T, 16), code * 2^-24, columns as in `slot_factors`."""
    a, b, c, d = gl.inline_asm_elementwise(
        UNPACK_SLOTS, "=r,=r,=r,=r,r", [split_words(words)],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2)
    x = gl.join(gl.join(a, b), gl.join(c, d)).reshape([T // 32, 8, D // 64, 2, 2, 2, 2])
    x = x.permute([0, 6, 5, 1, 3, 2, 4]).reshape([T, 2, D // 64, 2])  # tile, m, half, g | u | part | e
    x = gl.convert_layout(x, gl.SliceLayout(3, slot_layout(T, D)), assert_trivial=True)
    zeros = gl.zeros([T, 2, D // 64, 256 // D, 2], gl.float16, layout=slot_layout(T, D))
    x, _ = gl.broadcast(gl.expand_dims(x, 3), zeros)  # every quad of a part reads the same
    return gl.convert_layout(x.reshape([T, 16]), operand_a(), assert_trivial=True)


@gluon.jit
def channel_row(x, D: gl.constexpr):
    """(D channels) -> A operand (16, D) with that row sixteen times."""
    x = x.reshape([4, D // 8, 2]).permute([1, 0, 2]).reshape([D])
    x = gl.convert_layout(x, gl.SliceLayout(0, operand_a()), assert_trivial=True)
    row, _ = gl.broadcast(gl.expand_dims(x, 0), gl.zeros([16, D], gl.float16, layout=operand_a()))
    return row


@gluon.jit
def token_rows(x, T: gl.constexpr):
    """(T tokens) -> the same in the row order of `key_operand`, as a column of the accumulator."""
    x = x.reshape([T // 32, 8, 2, 2]).permute([0, 2, 3, 1])  # tile, m, half, g
    return gl.convert_layout(x.reshape([T]), gl.SliceLayout(1, accumulator()), assert_trivial=True)


@gluon.jit
def probability_operand(p, T: gl.constexpr):
    """Accumulator (T, 8 heads) of 16 bit -> B operand (T, 8), by transposing each 8 x 8 block inside the warp."""
    p = gl.inline_asm_elementwise("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [p], dtype=p.dtype,
                                  is_pure=True, pack=2)
    p = p.reshape([T // 8, 8, 8]).permute([0, 2, 1]).reshape([T, 8])
    return gl.convert_layout(p, operand_b(), assert_trivial=True)


@gluon.jit
def channel_rows(o, D: gl.constexpr):
    """Accumulator (D, 8 heads) -> (8 heads, D channels) in memory order."""
    o = o.reshape([D // 16, 2, 8, 8]).permute([3, 2, 0, 1])  # head | g, m, half
    return gl.convert_layout(o.reshape([8, D]), output_layout(D), assert_trivial=True)


@gluon.jit
def plain_key_operand(k, D: gl.constexpr):
    """(32 tokens, D) in plain_key_layout -> A operand (32, D)."""
    k = k.reshape([8, 2, 2, 4, D // 8, 2]).permute([1, 2, 0, 4, 3, 5])  # m, half, g | u, t, e
    return gl.convert_layout(k.reshape([32, D]), operand_a(), assert_trivial=True)


@gluon.jit
def plain_value_operand(v, D: gl.constexpr):
    """(32 tokens, D) in plain_value_layout -> A operand (D, 32)."""
    v = v.reshape([4, 2, 4, 8, D // 16, 2]).permute([4, 5, 3, 2, 0, 1])  # m, half, g | u, t, e
    return gl.convert_layout(v.reshape([D, 32]), operand_a(), assert_trivial=True)


@gluon.constexpr_function
def lane_sum_layout():
    return gl.BlockedLayout([1, 2], [8, 4], [1, 1], [1, 0])


@gluon.jit
def lane_sums(x, T: gl.constexpr):
    """(T, 8 heads) accumulator -> (8 g, 8 heads): each lane adds up its own tokens."""
    return gl.convert_layout(gl.sum(x.reshape([T // 8, 8, 8]), axis=0), lane_sum_layout(), assert_trivial=True)


@gluon.jit
def lane_columns(x):
    """(8 heads) of the accumulator's columns -> the same for lane sums."""
    return gl.convert_layout(x, gl.SliceLayout(0, lane_sum_layout()), assert_trivial=True)


@gluon.jit
def warp_sums(x):
    """Lane sums -> (8 heads) of the accumulator's columns."""
    return gl.convert_layout(gl.sum(x, axis=0), gl.SliceLayout(0, accumulator()), assert_trivial=True)


@gluon.jit
def field_factor(u, BITS: gl.constexpr):
    """2^-(f * BITS) of column half u: undoes the place of field f in its byte."""
    f = u % (8 // BITS)
    return gl.exp2(-(f * BITS).to(gl.float32))


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
