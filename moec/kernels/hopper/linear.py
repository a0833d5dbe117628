"""The FP8 linear layer for few tokens on sm_90, in Gluon; its weights come through a `Pipeline`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from moec.kernels.hopper.pipeline import allocate, copy_first, product


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
    column = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    token = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUMS))
    used = token < tokens
    by_row = gl.load(weight_scale + column)
    gdc_wait()
    by_token = gl.load(scale + token, mask=used, other=0.0)
    total = product(0, pipe, SUMS, DIM)
    total = total * by_row[:, None] * by_token[None, :]
    at = out + token[None, :] * WIDTH + column[:, None]
    gl.store(at, total.to(gl.bfloat16), mask=used[None, :])


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

    Grid (width / ROWS). Descriptors: codes, weight.
    """
    pipe = allocate(codes, weight, STAGES, COLUMNS, ROWS, DEPTH, 1)
    gl.warp_specialize(
        [
            (_multiply, (scale, weight_scale, out, tokens, pipe, WIDTH, DIM)),
            (_copy, (codes, weight, pipe, DIM)),
        ],
        [1],
        [40],
    )
