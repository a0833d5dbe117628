"""Triton kernels with one program per token: residual sum and norm, SwiGLU, FP8 quantisation."""

import triton
import triton.language as tl

from moec.kernels.triton.overlap import next_may_start, wait


@triton.jit
def encode_row(row, at, inside, codes, scale, token, WIDTH: tl.constexpr):
    """Write a row of bf16 values, given in float32, as E4M3 values and their scale."""
    one = tl.maximum(tl.max(tl.abs(row), 0) / 448.0, 1e-12)
    tl.store(codes + token.to(tl.int64) * WIDTH + at, (row / one).to(tl.float8e4nv), mask=inside)
    tl.store(scale + token, one)


@triton.jit(do_not_specialize=["tokens"])
def skip_norm(
    x,
    skip,
    gain,
    total,
    normed,
    codes,
    scale,
    tokens,
    DIM: tl.constexpr,
    DIM_2: tl.constexpr,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,
    NARROW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The RMS norm of total, times gain, where total is x + skip with ADD and x without.

    Grid (tokens). skip is bf16 [tokens, dim], or with PARTS above 1 partial sums, float32
    [PARTS, tokens, dim], which are added in order. The result is bf16 [tokens, dim] in normed, or
    with NARROW quantised, in codes and scale.
    """
    token, at = tl.program_id(0), tl.arange(0, DIM_2)
    inside, start = at < DIM, token.to(tl.int64) * DIM
    next_may_start(OVERLAP)
    weight = tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
    wait(OVERLAP)
    row = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(skip + start + at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            place = (part * tokens + token).to(tl.int64) * DIM + at
            more += tl.load(skip + place, mask=inside, other=0.0)
        row += more.to(tl.bfloat16).to(tl.float32)
        row = row.to(tl.bfloat16).to(tl.float32)
        tl.store(total + start + at, row.to(tl.bfloat16), mask=inside)
    root = tl.rsqrt(tl.sum(row * row, 0) / DIM + EPS)
    row = ((row * root).to(tl.bfloat16).to(tl.float32) * weight).to(tl.bfloat16).to(tl.float32)
    if NARROW:
        encode_row(row, at, inside, codes, scale, token, DIM)
    else:
        tl.store(normed + start + at, row.to(tl.bfloat16), mask=inside)


@triton.jit
def encode(
    x,
    codes,
    scale,
    DIM: tl.constexpr,
    DIM_2: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Quantise x, bf16 [tokens, dim], to codes and scale. Grid (tokens)."""
    token, at = tl.program_id(0), tl.arange(0, DIM_2)
    next_may_start(OVERLAP)
    wait(OVERLAP)
    inside = at < DIM
    row = tl.load(x + token.to(tl.int64) * DIM + at, mask=inside, other=0.0).to(tl.float32)
    encode_row(row, at, inside, codes, scale, token, DIM)


@triton.jit
def swiglu(
    gate_up,
    codes,
    scale,
    HIDDEN: tl.constexpr,
    HIDDEN_2: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Quantise silu(gate) * up of gate_up, bf16 [tokens, 2 * hidden]. Grid (tokens)."""
    token, at = tl.program_id(0), tl.arange(0, HIDDEN_2)
    next_may_start(OVERLAP)
    wait(OVERLAP)
    inside, start = at < HIDDEN, token.to(tl.int64) * (2 * HIDDEN)
    gate = tl.load(gate_up + start + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + start + HIDDEN + at, mask=inside, other=0.0).to(tl.float32)
    act = gate * tl.sigmoid(gate) * up
    encode_row(act.to(tl.bfloat16).to(tl.float32), at, inside, codes, scale, token, HIDDEN)
