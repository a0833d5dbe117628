"""The two products of the prefill MoE layer on sm_90, in Gluon: one warp copies, eight multiply.

The copying warp asks the TMA unit (the GPU's copy engine) for tiles of both operands, up to STAGES
steps ahead and across the borders of output tiles. Two groups of four warps compute 64 rows each of
an output tile. Neither waits for the other: while one rounds and stores, the other keeps the tensor
core busy.

The tensor core accumulates FP8 products in about 14 bits. So its sums are added to a total after
every CHUNK inputs. Registers have no room for a float32 total beside 64 x 256 sums. The total is
therefore kept in bf16, two values per register, and what rounding it cuts off stays in the tensor
core's sums: nothing is lost.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moec.kernels.hopper.arithmetic import add, add_truncated, sigmoid
from moec.kernels.hopper.pipeline import Pipeline


@gluon.jit
def tile_at(tile, tiles, COLUMNS: gl.constexpr, GROUP: gl.constexpr):
    """Row and column of an output tile, in groups of GROUP rows, which find their weights in L2."""
    group = tile // (GROUP * COLUMNS)
    height = gl.minimum(tiles - group * GROUP, GROUP)
    inner = tile % (GROUP * COLUMNS)
    return group * GROUP + inner % height, inner // height


@gluon.jit
def copy_tile(rows, weight, row, first, step, pipe, INPUTS: gl.constexpr, SECOND: gl.constexpr):
    """Copy what an output tile needs, from step number `step` on; return the next one's number.

    The tile takes the rows from `row`, and weights from `first` and from SECOND rows later.
    """
    STAGES: gl.constexpr = pipe.x_tiles.shape[0]
    TILE: gl.constexpr = pipe.x_tiles.shape[1]
    DEPTH: gl.constexpr = pipe.x_tiles.shape[2]
    COLUMNS: gl.constexpr = pipe.w_tiles.shape[1]
    for k in range(0, INPUTS, DEPTH):
        slot = step % STAGES
        ready = pipe.full.index(slot)
        mbarrier.wait(pipe.empty.index(slot), (step // STAGES & 1) ^ 1)
        mbarrier.expect(ready, (TILE + 2 * COLUMNS) * DEPTH)
        tma.async_copy_global_to_shared(rows, [row, k], ready, pipe.x_tiles.index(slot))
        tma.async_copy_global_to_shared(weight, [first, k], ready, pipe.w_tiles.index(2 * slot))
        tma.async_copy_global_to_shared(
            weight, [first + SECOND, k], ready, pipe.w_tiles.index(2 * slot + 1)
        )
        step += 1
    return step


@gluon.jit
def _copy(
    rows,
    weight,
    plan,
    pipe,
    INPUTS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    SECOND: gl.constexpr,
    STEP: gl.constexpr,
    MANY: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The copying warp: the tiles of both operands, step by step, into empty slots."""
    TILE: gl.constexpr = pipe.x_tiles.shape[1]
    tiles = gl.load(plan)
    step = 0
    for tile in range(gl.program_id(0), tiles * MANY, gl.num_programs(0)):
        across, along = tile_at(tile, tiles, MANY, GROUP)
        first = gl.load(plan + 1 + 2 * across) * OUTPUTS + along * STEP
        step = copy_tile(rows, weight, across * TILE, first, step, pipe, INPUTS, SECOND)


@gluon.jit
def sums_of_tile(
    left, right, step, pipe, PART: gl.constexpr, INPUTS: gl.constexpr, CHUNK: gl.constexpr
):
    """The sums of a group's 64 rows of a tile, in both halves, and the number of the next step.

    What left and right held before does not matter: the first product overwrites it.
    """
    STAGES: gl.constexpr = pipe.x_tiles.shape[0]
    DEPTH: gl.constexpr = pipe.x_tiles.shape[2]
    COLUMNS: gl.constexpr = pipe.w_tiles.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    total = gl.zeros((64, COLUMNS), gl.int32, SUMS)
    for chunk in range(INPUTS // CHUNK):
        if chunk > 0:
            total, left, right = add_truncated(total, left, right)
        for inner in range(CHUNK // DEPTH):
            slot = step % STAGES
            mbarrier.wait(pipe.full.index(slot), step // STAGES & 1)
            x = pipe.x_tiles.index(slot).slice(PART * 64, 64)
            w_left = pipe.w_tiles.index(2 * slot).permute((1, 0))
            w_right = pipe.w_tiles.index(2 * slot + 1).permute((1, 0))
            left = warpgroup_mma(x, w_left, left, use_acc=chunk + inner > 0, is_async=True)
            right = warpgroup_mma(x, w_right, right, use_acc=chunk + inner > 0, is_async=True)
            left, right = warpgroup_mma_wait(2, deps=(left, right))
            before = (step + STAGES - 1) % STAGES
            mbarrier.arrive(pipe.empty.index(before), pred=inner > 0)
            step += 1
        left, right = warpgroup_mma_wait(0, deps=(left, right))
        mbarrier.arrive(pipe.empty.index((step + STAGES - 1) % STAGES))
    if CHUNK < INPUTS:
        left, right = add(total, left, right)
    return left, right, step


@gluon.jit
def store_tile(values, out, out_tile, row, column):
    """Round values and start to store them, once what was stored before has left `out_tile`."""
    tma.store_wait(0)
    out_tile.store(values.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], out_tile)


@gluon.jit
def _multiply(
    x_scale,
    plan,
    w_scale,
    out,
    pipe,
    out_tile,
    PART: gl.constexpr,
    INPUTS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    SECOND: gl.constexpr,
    STEP: gl.constexpr,
    MANY: gl.constexpr,
    GROUP: gl.constexpr,
    CHUNK: gl.constexpr,
    GATED: gl.constexpr,
):
    """One group of multiplying warps: its 64 rows of each tile, unless all of them are padding."""
    STAGES: gl.constexpr = pipe.x_tiles.shape[0]
    TILE: gl.constexpr = pipe.x_tiles.shape[1]
    DEPTH: gl.constexpr = pipe.x_tiles.shape[2]
    COLUMNS: gl.constexpr = pipe.w_tiles.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tiles = gl.load(plan)
    step = 0
    left = gl.zeros((64, COLUMNS), gl.float32, SUMS)
    right = gl.zeros((64, COLUMNS), gl.float32, SUMS)
    for tile in range(gl.program_id(0), tiles * MANY, gl.num_programs(0)):
        across, along = tile_at(tile, tiles, MANY, GROUP)
        first = gl.load(plan + 1 + 2 * across) * OUTPUTS + along * STEP
        if gl.load(plan + 2 + 2 * across) > PART * 64:
            row = across * TILE + PART * 64
            by_row = gl.load(x_scale + row + gl.arange(0, 64, gl.SliceLayout(1, SUMS)))
            scales = (
                w_scale + first + gl.arange(0, COLUMNS, FLAT)
            )  # one per thread, long before use
            left_scale = gl.load(scales)
            right_scale = gl.load(scales + SECOND)
            left, right, step = sums_of_tile(left, right, step, pipe, PART, INPUTS, CHUNK)
            left_scale = gl.convert_layout(left_scale, gl.SliceLayout(0, SUMS))
            right_scale = gl.convert_layout(right_scale, gl.SliceLayout(0, SUMS))
            left = left * by_row[:, None] * left_scale[None, :]
            right = right * by_row[:, None] * right_scale[None, :]
            if GATED:
                left = left * sigmoid(left) * right
            store_tile(left, out, out_tile, row, along * STEP)
            if not GATED:
                store_tile(right, out, out_tile, row, along * STEP + COLUMNS)
        else:
            for _ in range(INPUTS // DEPTH):
                mbarrier.wait(pipe.full.index(step % STAGES), step // STAGES & 1)
                mbarrier.arrive(pipe.empty.index(step % STAGES))
                step += 1
    tma.store_wait(0)


@gluon.jit
def _product(
    rows,
    x_scale,
    plan,
    weight,
    w_scale,
    out,
    INPUTS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    SECOND: gl.constexpr,
    STEP: gl.constexpr,
    MANY: gl.constexpr,
    GROUP: gl.constexpr,
    CHUNK: gl.constexpr,
    STAGES: gl.constexpr,
    TILE: gl.constexpr,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
    GATED: gl.constexpr,
):
    """The product of one layer's experts; with GATED its result is the SwiGLU of gate and up.

    An output tile takes COLUMNS rows of the weights and as many more that start SECOND rows later.
    Each expert has OUTPUTS rows of weights: MANY tiles, STEP rows apart.
    """
    x_tiles = gl.allocate_shared_memory(rows.dtype, [STAGES, TILE, DEPTH], rows.layout)
    w_tiles = gl.allocate_shared_memory(weight.dtype, [2 * STAGES, COLUMNS, DEPTH], weight.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [2, 64, COLUMNS], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)  # both groups have multiplied its tiles
    fence_async_shared()
    pipe = Pipeline(x_tiles, w_tiles, full, empty)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    x_scale,
                    plan,
                    w_scale,
                    out,
                    pipe,
                    out_tiles.index(0),
                    0,
                    INPUTS,
                    OUTPUTS,
                    SECOND,
                    STEP,
                    MANY,
                    GROUP,
                    CHUNK,
                    GATED,
                ),
            ),
            (
                _multiply,
                (
                    x_scale,
                    plan,
                    w_scale,
                    out,
                    pipe,
                    out_tiles.index(1),
                    1,
                    INPUTS,
                    OUTPUTS,
                    SECOND,
                    STEP,
                    MANY,
                    GROUP,
                    CHUNK,
                    GATED,
                ),
            ),
            (
                _copy,
                (rows, weight, plan, pipe, INPUTS, OUTPUTS, SECOND, STEP, MANY, GROUP),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def gate_up(
    rows,
    row_scale,
    plan,
    weight,
    weight_scale,
    act,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    TILE: gl.constexpr,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
    CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Like `gate_up` in `moec.kernels.triton.moe_prefill`, for tiles of 128 rows.

    Launch it with 4 warps. Descriptors: rows, weight, act.
    """
    _product(
        rows,
        row_scale,
        plan,
        weight,
        weight_scale,
        act,
        DIM,
        2 * HIDDEN,
        HIDDEN,
        COLUMNS,
        HIDDEN // COLUMNS,
        GROUP,
        CHUNK,
        STAGES,
        TILE,
        COLUMNS,
        DEPTH,
        True,
    )


@gluon.jit
def down(
    act_codes,
    act_scale,
    plan,
    weight,
    weight_scale,
    parts,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    TILE: gl.constexpr,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
    CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Like `down` in `moec.kernels.triton.moe_prefill`, for tiles of 128 rows.

    Launch it with 4 warps. Descriptors: act_codes, weight, parts.
    """
    _product(
        act_codes,
        act_scale,
        plan,
        weight,
        weight_scale,
        parts,
        HIDDEN,
        DIM,
        COLUMNS,
        2 * COLUMNS,
        DIM // (2 * COLUMNS),
        GROUP,
        CHUNK,
        STAGES,
        TILE,
        COLUMNS,
        DEPTH,
        False,
    )
