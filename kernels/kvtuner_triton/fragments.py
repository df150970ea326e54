"""Fragment order: where each code of a page sits, so that a GPU lane loads MMA operands as they are.

Decode attention multiplies transposed, with mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):

    scores   S'[tokens, heads]  = K [tokens, channels] . q'[channels, heads]      A = K
    output   O'[channels, heads] = V'[channels, tokens] . P'[tokens, heads]       A = V transposed

so K and V are always the A operand, 16 x 16.  Lane 4 g + t of a warp (g = 0..7, t = 0..3) holds of A

                 columns 2t, 2t+1     columns 8+2t, 8+2t+1
    row g        register 0           register 2              e = 0, 1: the two columns of a register
    row 8 + g    register 1           register 3              half = 0, 1: the two rows

Which token or channel is "row r" or "column c" is free as long as both operands agree.  Rows and columns are numbered
so that a lane's tokens and channels are neighbours in memory, and it can read scales, zeros and the query 16 bytes at a
time.  A page is a sequence of tiles of 32 tokens; u counts the column halves of 8:

    K   token   = 32 tile + 4 g + 2 m + half      m = 0, 1               row tile
        channel = (head_dim / 4) t + 2 u + e      u = 0 .. head_dim/8 - 1
    V   channel = (head_dim / 8) g + 2 m + half   m = 0 .. head_dim/16 - 1
        token   = 32 tile + 8 t + 4 e + u         u = 0 .. 3

    byte    holds the codes of `per` = 8 / bits neighbouring u, little end first (f = u mod per, at bit f * bits)
    word    four bytes, (e, half) = (0,0) (0,1) (1,0) (1,1): masking a word gives two columns of one row at once
    w       number of a lane's word in a tile = (u // per) * row tiles + m
    byte address in the tile = 512 (w // 4) + 16 lane + 4 (w mod 4) + 2 e + half

so one load is 16 bytes a lane and 512 contiguous bytes a warp, and a page takes page * head_dim * bits / 8 bytes.

Second halves of boosted keys (layout.py) are four bits each, at most four slots a lane: the lane that has channels of
those slots has them of all its tokens, 4 g + 0 .. 3, in one 16-bit unit a slot, little end first

    address in the page = 2 * ((8 tile + g) * slots + slot)       nibble i: token 32 tile + 4 g + i

Marlin (arXiv 2408.11743) does the same for weights and BitDecoding (arXiv 2503.18773) for KV caches.
"""

import torch

TILE = 32  # tokens that share one block of fragments


def order_keys(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes: (..., page, head_dim) uint8, one a byte -> (..., page, head_dim * bits / 8) uint8, in fragment order."""
    *lead, page, head_dim = codes.shape
    per = 8 // bits
    x = codes.reshape(-1, page // TILE, 8, 2, 2, 4, head_dim // 8 // per, per, 2)
    x = x.permute(0, 1, 6, 3, 2, 5, 8, 4, 7)  # page, tile, u // per, m, g, t, e, half, f
    return _to_bytes(x, bits).reshape(*lead, page, head_dim * bits // 8)


def order_values(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The same for values: codes (..., page, head_dim) uint8 -> (..., page, head_dim * bits / 8) uint8."""
    *lead, page, head_dim = codes.shape
    per = 8 // bits
    x = codes.reshape(-1, page // TILE, 4, 2, 4 // per, per, 8, head_dim // 16, 2)
    x = x.permute(0, 1, 4, 7, 6, 2, 3, 8, 5)  # page, tile, u // per, m, g, t, e, half, f
    return _to_bytes(x, bits).reshape(*lead, page, head_dim * bits // 8)


def restore_keys(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of order_keys: (..., page, head_dim * bits / 8) uint8 -> codes (..., page, head_dim) uint8."""
    *lead, page, width = packed.shape
    head_dim = width * 8 // bits
    x = _from_bytes(packed.reshape(-1, page // TILE, TILE * width), bits, row_tiles=2)
    return x.permute(0, 1, 4, 3, 7, 5, 2, 8, 6).reshape(*lead, page, head_dim)


def restore_values(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of order_values."""
    *lead, page, width = packed.shape
    head_dim = width * 8 // bits
    x = _from_bytes(packed.reshape(-1, page // TILE, TILE * width), bits, row_tiles=head_dim // 16)
    return x.permute(0, 1, 5, 6, 2, 8, 4, 3, 7).reshape(*lead, page, head_dim)


def order_slots(halves: torch.Tensor) -> torch.Tensor:
    """halves: (..., page, slots) uint8 below 16 -> (..., page, slots / 2) uint8, as above."""
    *lead, page, slots = halves.shape
    x = halves.reshape(-1, page // TILE, 8, 2, 2, slots).permute(0, 1, 2, 5, 3, 4)  # page, tile, g, slot, byte, nibble
    return (x[..., 0] | x[..., 1] << 4).reshape(*lead, page, slots // 2)


def restore_slots(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of order_slots: (..., page, slots / 2) uint8 -> (..., page, slots) uint8."""
    *lead, page, width = packed.shape
    x = packed.reshape(-1, page // TILE, 8, 2 * width, 2)
    x = torch.stack([x & 15, x >> 4], -1).permute(0, 1, 2, 4, 5, 3)
    return x.reshape(*lead, page, 2 * width)


def _to_bytes(x: torch.Tensor, bits: int) -> torch.Tensor:
    """(pages, tiles, u // per, m, g, t, e, half, f) codes -> bytes in address order."""
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.int32)
    x = (x.to(torch.int32) << shifts).sum(-1).to(torch.uint8)
    x = x.flatten(2, 3).unflatten(2, (-1, 4))  # pages, tiles, w // 4, w mod 4, g, t, e, half
    return x.permute(0, 1, 2, 4, 5, 3, 6, 7)


def _from_bytes(x: torch.Tensor, bits: int, row_tiles: int) -> torch.Tensor:
    """(pages, tiles, bytes) -> (pages, tiles, u // per, m, g, t, e, half, f) codes."""
    x = x.unflatten(2, (-1, 8, 4, 4, 2, 2)).permute(0, 1, 2, 5, 3, 4, 6, 7)
    x = x.flatten(2, 3).unflatten(2, (-1, row_tiles))
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    return (x.unsqueeze(-1) >> shifts) & (2**bits - 1)
