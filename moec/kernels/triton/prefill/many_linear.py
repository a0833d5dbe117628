"""The FP8 linear layer for many tokens, in Triton: large tiles, which find their operands in L2."""

import triton
import triton.language as tl

from moec.kernels.triton.moe_prefill import tile_at


@triton.jit(do_not_specialize=["tokens"])
def many_linear(
    codes,
    scale,
    weight,
    weight_scale,
    out,
    tokens,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """codes [tokens, dim] by weight [width, dim] -> out bf16 [tokens, width].

    Any grid of one axis. Descriptors: codes, weight, out. Tiles reach past the last token and the
    last output: descriptors read zeros there and write nothing.
    """
    tiles, many = tl.cdiv(tokens, TILE), tl.cdiv(WIDTH, COLUMNS)
    for tile in range(tl.program_id(0), tiles * many, tl.num_programs(0)):
        across, along = tile_at(tile, tiles, many, GROUP)
        total = tl.zeros((TILE, COLUMNS), tl.float32)
        for k in range(0, DIM, DEPTH):
            x = codes.load([across * TILE, k])
            w = weight.load([along * COLUMNS, k])
            total = tl.dot(x, w.T, total)
        token = across * TILE + tl.arange(0, TILE)
        column = along * COLUMNS + tl.arange(0, COLUMNS)
        by_token = tl.load(scale + token, mask=token < tokens, other=0.0)
        by_column = tl.load(weight_scale + column, mask=column < WIDTH, other=0.0)
        total = total * by_token[:, None] * by_column[None, :]
        out.store([across * TILE, along * COLUMNS], total.to(tl.bfloat16))
