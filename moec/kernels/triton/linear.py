"""The FP8 linear layer for few tokens, in Triton: each weight is read once, by one program."""

import triton
import triton.language as tl

from moec.kernels.triton.overlap import next_may_start, wait


@triton.jit(do_not_specialize=["tokens"])
def linear(
    codes,
    scale,
    weight,
    weight_scale,
    out,
    tokens,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS_2: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """codes [tokens, dim] by weight [width, dim] -> out bf16 [tokens, width].

    Grid (width / ROWS). The inputs are not split (split-k): many steps under way at once are faster
    than more programs, which would have to wait for each other's sums.
    """
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, depth = tl.arange(0, TOKENS_2), tl.arange(0, DEPTH)
    next_may_start(OVERLAP)
    wait(OVERLAP)
    used = token[None, :] < tokens
    weight_at = weight + column[:, None].to(tl.int64) * DIM + depth[None, :]
    codes_at = codes + token[None, :] * DIM + depth[:, None]
    total = tl.zeros((ROWS, TOKENS_2), tl.float32)
    for k in range(0, DIM, DEPTH):
        w = tl.load(weight_at + k, eviction_policy="evict_first")
        x = tl.load(codes_at + k, mask=used, other=0.0)
        total = tl.dot(w, x, total)
    x_scale = tl.load(scale + token, mask=token < tokens, other=0.0)
    total = total * tl.load(weight_scale + column)[:, None] * x_scale[None, :]
    tl.store(out + token[None, :] * WIDTH + column[:, None], total.to(tl.bfloat16), mask=used)
