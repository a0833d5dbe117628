"""The FP8 MoE layer for few tokens, 1 to 64: the Triton kernels around its two products.

A layer is five launches, one after the other:

    route     norm and router logits; the input's quantised values and per-token scales
    gate_up   gate and up of the chosen experts and of the shared one, SwiGLU, largest magnitudes
    encode    quantises what SwiGLU gave
    down      the down product
    combine   the sum of the routed and the shared expert

`gate_up` and `down` are in `moe_decode_products`; on sm_90, for up to 16 tokens, in
`moec.kernels.hopper.moe_decode`.

In Llama 4 the router's score scales the expert's input. Rounding x * s with a per-token scale gives
the quantised values of x and a scale s times as large. So routed and shared experts use the same
quantised values.

Sums run in a fixed order, and maxima do not depend on the order: results repeat to the bit.
"""

import triton
import triton.language as tl

from moec.kernels.triton.overlap import next_may_start, wait


@triton.jit(do_not_specialize=["tokens"])
def route(
    x,
    skip,
    gain,
    total,
    router,
    logits,
    codes,
    scale,
    largest,
    tokens,
    DIM: tl.constexpr,
    DIM_2: tl.constexpr,
    EXPERTS: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute the router logits of x, bf16 [tokens, dim], and quantise x.

    Grid (tokens, experts + 1): a program computes one logit; the last column's quantises a token.

    With NORM the layer's input is the RMS norm of total = x + skip, times gain. It writes logits,
    float32 [tokens, experts], rounded to bf16 as a linear layer would; total; the quantised values
    codes [tokens, dim] and their scale [tokens]; and zeros to largest [2 * tokens].
    """
    token, expert = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, DIM_2)
    inside, row_at = at < DIM, token * DIM + at
    next_may_start(OVERLAP)
    known = inside & (expert < EXPERTS)
    weight = tl.load(router + expert * DIM + at, mask=known, other=0.0).to(tl.float32)
    wait(OVERLAP)
    row = tl.load(x + row_at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        row += tl.load(skip + row_at, mask=inside, other=0.0).to(tl.float32)
        row = row.to(tl.bfloat16).to(tl.float32)
        if expert == EXPERTS:
            tl.store(total + row_at, row.to(tl.bfloat16), mask=inside)
        root = tl.rsqrt(tl.sum(row * row, 0) / DIM + EPS)
        factor = tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
        row = ((row * root).to(tl.bfloat16).to(tl.float32) * factor).to(tl.bfloat16).to(tl.float32)
    if expert < EXPERTS:
        logit = tl.sum(row * weight, 0).to(tl.bfloat16).to(tl.float32)
        tl.store(logits + token * EXPERTS + expert, logit)
    else:
        one = tl.maximum(tl.max(tl.abs(row), 0) / 448.0, 1e-12)
        tl.store(codes + row_at, (row / one).to(tl.float8e4nv), mask=inside)
        tl.store(scale + token, one)
        tl.store(largest + token, 0)
        tl.store(largest + tokens + token, 0)


@triton.jit
def encode(
    act,
    largest,
    act_codes,
    HIDDEN: tl.constexpr,
    OVERLAP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Quantise act to E4M3, with a scale per row from its largest magnitude.

    Grid (2 * tokens, hidden / WIDTH).
    """
    row, at = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    next_may_start(OVERLAP)
    wait(OVERLAP)
    scale = tl.maximum(tl.load(largest + row).to(tl.float32, bitcast=True) / 448.0, 1e-12)
    values = tl.load(act + row * HIDDEN + at).to(tl.float32)
    tl.store(act_codes + row * HIDDEN + at, (values / scale).to(tl.float8e4nv))


@triton.jit
def combine(
    parts,
    out,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Add up the partial sums, float32 parts [PARTS, tokens, dim], in order.

    Grid (tokens, dim / WIDTH). It writes out, bf16 [tokens, dim].
    """
    token, tokens = tl.program_id(0), tl.num_programs(0)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    next_may_start(OVERLAP)
    wait(OVERLAP)
    total = tl.zeros((WIDTH,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (part * tokens + token) * DIM + at)
    tl.store(out + token * DIM + at, total.to(tl.bfloat16))
