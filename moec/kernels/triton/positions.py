"""What all layers of a step know of its tokens' positions, a program for each token."""

import triton
import triton.language as tl


@triton.jit
def rope_table(positions, rates, cos, sin, HALF: tl.constexpr):
    """Grid (tokens). positions int64 [tokens], rates float32 [HALF] -> float32 [tokens, HALF]."""
    token, at = tl.program_id(0), tl.arange(0, HALF)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(rates + at)
    tl.store(cos + token * HALF + at, tl.cos(angle))
    tl.store(sin + token * HALF + at, tl.sin(angle))


@triton.jit
def temperature(positions, factor, FLOOR: tl.constexpr, SCALE: tl.constexpr):
    """Grid (tokens). positions int64 [tokens] -> factor float32 [tokens]."""
    token = tl.program_id(0)
    seen = tl.load(positions + token).to(tl.float32) + 1
    steps = tl.floor(tl.div_rn(seen, float(FLOOR)))  # `/` may fall short of a whole number
    tl.store(factor + token, 1 + SCALE * tl.log(1 + steps))
