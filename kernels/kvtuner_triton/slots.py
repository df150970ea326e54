"""layout.boost_slots inside kernels, for head_dim 64 and 128."""

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it


@triton.jit
def boost_slot(channel):
    """Which of the head_dim / 16 slots a channel is in: one channel of each is boosted."""
    return channel // 64 * 4 + ((channel % 4) ^ (channel % 64 // 32 * 2))
