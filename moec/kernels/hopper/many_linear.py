"""The FP8 linear layer for many tokens on sm_90, in Gluon: one layer, by `moe_prefill`'s functions.

Tiles reach past the last token and the last output. The TMA unit reads zeros there and writes
nothing.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moec.kernels.hopper.moe_prefill import copy_tile, store_tile, sums_of_tile, tile_at
from moec.kernels.hopper.pipeline import Pipeline


@gluon.jit
def _copy(codes, weight, tokens, pipe, WIDTH: gl.constexpr, DIM: gl.constexpr, GROUP: gl.constexpr):
    """The copying warp."""
    TILE: gl.constexpr = pipe.x_tiles.shape[1]
    COLUMNS: gl.constexpr = pipe.w_tiles.shape[1]
    MANY: gl.constexpr = (WIDTH + 2 * COLUMNS - 1) // (2 * COLUMNS)
    tiles = (tokens + TILE - 1) // TILE
    step = 0
    for tile in range(gl.program_id(0), tiles * MANY, gl.num_programs(0)):
        across, along = tile_at(tile, tiles, MANY, GROUP)
        step = copy_tile(
            codes, weight, across * TILE, along * (2 * COLUMNS), step, pipe, DIM, COLUMNS
        )


@gluon.jit
def _multiply(
    scale, weight_scale, out, tokens, pipe, out_tile,
    PART: gl.constexpr, WIDTH: gl.constexpr, DIM: gl.constexpr, GROUP: gl.constexpr,
    CHUNK: gl.constexpr,
):  # fmt: skip
    """One group of multiplying warps: its 64 rows of each tile."""
    TILE: gl.constexpr = pipe.x_tiles.shape[1]
    COLUMNS: gl.constexpr = pipe.w_tiles.shape[1]
    MANY: gl.constexpr = (WIDTH + 2 * COLUMNS - 1) // (2 * COLUMNS)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tiles = (tokens + TILE - 1) // TILE
    step = 0
    left = gl.zeros((64, COLUMNS), gl.float32, SUMS)
    right = gl.zeros((64, COLUMNS), gl.float32, SUMS)
    for tile in range(gl.program_id(0), tiles * MANY, gl.num_programs(0)):
        across, along = tile_at(tile, tiles, MANY, GROUP)
        row, first = across * TILE + PART * 64, along * (2 * COLUMNS)
        token = row + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
        by_row = gl.load(scale + token, mask=token < tokens, other=0.0)
        column = first + gl.arange(0, COLUMNS, FLAT)  # one per thread, long before use
        left_scale = gl.load(weight_scale + column, mask=column < WIDTH, other=0.0)
        right_scale = gl.load(
            weight_scale + column + COLUMNS, mask=column + COLUMNS < WIDTH, other=0.0
        )
        left, right, step = sums_of_tile(left, right, step, pipe, PART, DIM, CHUNK)
        left_scale = gl.convert_layout(left_scale, gl.SliceLayout(0, SUMS))
        right_scale = gl.convert_layout(right_scale, gl.SliceLayout(0, SUMS))
        left = left * by_row[:, None] * left_scale[None, :]
        right = right * by_row[:, None] * right_scale[None, :]
        store_tile(left, out, out_tile, row, first)
        store_tile(right, out, out_tile, row, first + COLUMNS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens"])
def many_linear(
    codes,
    scale,
    weight,
    weight_scale,
    out,
    tokens,
    WIDTH: gl.constexpr,
    DIM: gl.constexpr,
    TILE: gl.constexpr,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
    CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Like the kernel in `moec.kernels.triton.prefill.many_linear`, in tiles of 128 by 2 * COLUMNS.

    Launch it with 4 warps. Descriptors: codes, weight, out.
    """
    x_tiles = gl.allocate_shared_memory(codes.dtype, [STAGES, TILE, DEPTH], codes.layout)
    w_tiles = gl.allocate_shared_memory(weight.dtype, [2 * STAGES, COLUMNS, DEPTH], weight.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [2, 64, COLUMNS], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)  # both groups have multiplied its tiles
    fence_async_shared()
    pipe = Pipeline(x_tiles, w_tiles, full, empty)
    one, two = out_tiles.index(0), out_tiles.index(1)
    gl.warp_specialize(
        [
            (
                _multiply,
                (scale, weight_scale, out, tokens, pipe, one, 0, WIDTH, DIM, GROUP, CHUNK),
            ),
            (
                _multiply,
                (scale, weight_scale, out, tokens, pipe, two, 1, WIDTH, DIM, GROUP, CHUNK),
            ),
            (_copy, (codes, weight, tokens, pipe, WIDTH, DIM, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )
