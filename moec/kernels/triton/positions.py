"""Triton kernels on the positions of a step's tokens, for all layers; one program per token."""

import triton
import triton.language as tl


@triton.jit
def rope_table(positions, rates, cos, sin, HALF: tl.constexpr):
    """RoPE's tables, float32 [tokens, HALF], of positions and rates [HALF]. Grid (tokens)."""
    token, at = tl.program_id(0), tl.arange(0, HALF)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(rates + at)
    tl.store(cos + token * HALF + at, tl.cos(angle))
    tl.store(sin + token * HALF + at, tl.sin(angle))


@triton.jit
def temperature(positions, factor, FLOOR: tl.constexpr, SCALE: tl.constexpr):
    """The factor of each token's queries, float32 [tokens], of int64 positions. Grid (tokens)."""
    token = tl.program_id(0)
    seen = tl.load(positions + token).to(tl.float32) + 1
    steps = tl.floor(tl.div_rn(seen, float(FLOOR)))  # `/` may fall short of a whole number
    tl.store(factor + token, 1 + SCALE * tl.log(1 + steps))
