"""The FP8 linear layer for few tokens on sm_90, in Gluon; its weights come through a `Pipeline`.

A narrow layer, such as the part of a rank, has 32 outputs a program, so that more multiprocessors
have work. The tensor core then multiplies 64 rows, of which the last 32 are whatever the shared
memory holds; their results are not used.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from moec.kernels.hopper.pipeline import allocate, copy_first, joined, product

#: rows of weights that the tensor core multiplies
TILE = gl.constexpr(64)


@gluon.jit
def _copy(codes, weight, pipe, DIM: gl.constexpr):
    """The copying warp."""
    row = gl.program_id(0) * pipe.w_tiles.shape[1]
    copy_first(codes, weight, 0, row, 0, pipe, DIM)


@gluon.jit
def _multiply(scale, weight_scale, out, tokens, pipe, WIDTH: gl.constexpr, DIM: gl.constexpr):
    """The multiplying warps: ROWS outputs for all tokens."""
    ROWS: gl.constexpr = pipe.w_tiles.shape[1]
    COLUMNS: gl.constexpr = pipe.x_tiles.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    row = gl.arange(0, TILE, gl.SliceLayout(1, SUMS))
    column, mine = gl.program_id(0) * ROWS + row, row < ROWS
    token = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUMS))
    used = token < tokens
    by_row = gl.load(weight_scale + column, mask=mine, other=0.0)
    gdc_wait()
    by_token = gl.load(scale + token, mask=used, other=0.0)
    total = product(0, joined(pipe), SUMS, DIM)
    total = total * by_row[:, None] * by_token[None, :]
    at = out + token[None, :] * WIDTH + column[:, None]
    gl.store(at, total.to(gl.bfloat16), mask=mine[:, None] & used[None, :])


@gluon.jit(do_not_specialize=["tokens"])
def linear(
    codes,
    scale,
    weight,
    weight_scale,
    out,
    tokens,
    WIDTH: gl.constexpr,
    DIM: gl.constexpr,
    COLUMNS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Like `linear` in `moec.kernels.triton.linear`, for at most COLUMNS tokens.

    Grid (width / ROWS), ROWS 64 or 32. Descriptors: codes, weight.
    """
    pipe = allocate(codes, weight, STAGES, COLUMNS, ROWS, DEPTH, TILE // ROWS)
    gl.warp_specialize(
        [
            (_multiply, (scale, weight_scale, out, tokens, pipe, WIDTH, DIM)),
            (_copy, (codes, weight, pipe, DIM)),
        ],
        [1],
        [40],
    )
