"""The two products of `moe_prefill` for sm_90, in Gluon: who copies tiles, and who multiplies.

One warp asks the copy engine for tiles, STAGES ahead and over the borders of tiles; two groups of
four warps have 64 rows each and do not wait for one another: while one rounds and stores, the other
keeps the tensor core busy.

The tensor core adds FP8 products with some 14 bits. So every CHUNK of inputs what it has is added
to a total. There is no room for that in float32 beside 64 x 256 sums: it is kept in bf16, two in a
register, and what that cuts off stays with the tensor core's sums, so that nothing is lost.
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


@gluon.jit
def _tile(tile, tiles, COLUMNS: gl.constexpr, GROUP: gl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, whose weights L2 then has."""
    group = tile // (GROUP * COLUMNS)
    height = gl.minimum(tiles - group * GROUP, GROUP)
    inner = tile % (GROUP * COLUMNS)
    return group * GROUP + inner % height, inner // height


@gluon.jit
def _copy(
    rows,
    weight,
    plan,
    x_tiles,
    w_tiles,
    full,
    empty,
    INPUTS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    SECOND: gl.constexpr,
    STEP: gl.constexpr,
    MANY: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The tiles of both operands, step by step, into the slots that are empty."""
    STAGES: gl.constexpr = x_tiles.shape[0]
    TILE: gl.constexpr = x_tiles.shape[1]
    DEPTH: gl.constexpr = x_tiles.shape[2]
    COLUMNS: gl.constexpr = w_tiles.shape[1]
    tiles = gl.load(plan)
    step = 0
    for tile in range(gl.program_id(0), tiles * MANY, gl.num_programs(0)):
        across, along = _tile(tile, tiles, MANY, GROUP)
        first = gl.load(plan + 1 + 2 * across) * OUTPUTS + along * STEP
        for k in range(0, INPUTS, DEPTH):
            slot = step % STAGES
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready, (TILE + 2 * COLUMNS) * DEPTH)
            tma.async_copy_global_to_shared(rows, [across * TILE, k], ready, x_tiles.index(slot))
            tma.async_copy_global_to_shared(weight, [first, k], ready, w_tiles.index(2 * slot))
            tma.async_copy_global_to_shared(
                weight, [first + SECOND, k], ready, w_tiles.index(2 * slot + 1)
            )
            step += 1


@gluon.jit
def _add(total, left, right):
    """total + (left, right), cut to two bf16 in an int32; and what was cut off."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t, u;
        .reg .f32 a, b;
        shl.b32 t, $3, 16;
        and.b32 u, $3, 0xffff0000;
        mov.b32 a, t;
        mov.b32 b, u;
        add.f32 a, a, $4;
        add.f32 b, b, $5;
        mov.b32 t, a;
        mov.b32 u, b;
        prmt.b32 $0, t, u, 0x7632;
        and.b32 t, t, 0xffff0000;
        and.b32 u, u, 0xffff0000;
        mov.b32 $1, t;
        mov.b32 $2, u;
        sub.f32 $1, a, $1;
        sub.f32 $2, b, $2;
        }""",
        "=&r,=&f,=&f,r,f,f",
        [total, left, right],
        dtype=(gl.int32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _sum(total, left, right):
    """As `_add`, but both as float32."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        .reg .f32 a, b;
        shl.b32 t, $2, 16;
        mov.b32 a, t;
        and.b32 t, $2, 0xffff0000;
        mov.b32 b, t;
        add.f32 $0, a, $3;
        add.f32 $1, b, $4;
        }""",
        "=&f,=&f,r,f,f",
        [total, left, right],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _sigmoid(x):
    """By the approximations of the GPU, whose error is far below that of bf16: 1.4427 is log2 e."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _multiply(
    x_scale,
    plan,
    w_scale,
    out,
    x_tiles,
    w_tiles,
    full,
    empty,
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
    """One group's 64 rows of each tile, unless all of them only fill up."""
    STAGES: gl.constexpr = x_tiles.shape[0]
    TILE: gl.constexpr = x_tiles.shape[1]
    DEPTH: gl.constexpr = x_tiles.shape[2]
    COLUMNS: gl.constexpr = w_tiles.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tiles = gl.load(plan)
    step = 0
    left = gl.zeros((64, COLUMNS), gl.float32, SUMS)
    right = gl.zeros((64, COLUMNS), gl.float32, SUMS)
    for tile in range(gl.program_id(0), tiles * MANY, gl.num_programs(0)):
        across, along = _tile(tile, tiles, MANY, GROUP)
        first = gl.load(plan + 1 + 2 * across) * OUTPUTS + along * STEP
        if gl.load(plan + 2 + 2 * across) > PART * 64:
            row = across * TILE + PART * 64
            by_row = gl.load(x_scale + row + gl.arange(0, 64, gl.SliceLayout(1, SUMS)))
            scales = w_scale + first + gl.arange(0, COLUMNS, FLAT)  # one a thread, long before use
            left_scale = gl.load(scales)
            right_scale = gl.load(scales + SECOND)
            total = gl.zeros((64, COLUMNS), gl.int32, SUMS)
            for chunk in range(INPUTS // CHUNK):
                if chunk > 0:
                    total, left, right = _add(total, left, right)
                for inner in range(CHUNK // DEPTH):
                    slot = step % STAGES
                    mbarrier.wait(full.index(slot), step // STAGES & 1)
                    x = x_tiles.index(slot).slice(PART * 64, 64)
                    w_left = w_tiles.index(2 * slot).permute((1, 0))
                    w_right = w_tiles.index(2 * slot + 1).permute((1, 0))
                    left = warpgroup_mma(x, w_left, left, use_acc=chunk + inner > 0, is_async=True)
                    right = warpgroup_mma(
                        x, w_right, right, use_acc=chunk + inner > 0, is_async=True
                    )
                    left, right = warpgroup_mma_wait(2, deps=(left, right))
                    before = (step + STAGES - 1) % STAGES
                    mbarrier.arrive(empty.index(before), pred=inner > 0)
                    step += 1
                left, right = warpgroup_mma_wait(0, deps=(left, right))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
            if CHUNK < INPUTS:
                left, right = _sum(total, left, right)
            left_scale = gl.convert_layout(left_scale, gl.SliceLayout(0, SUMS))
            right_scale = gl.convert_layout(right_scale, gl.SliceLayout(0, SUMS))
            left = left * by_row[:, None] * left_scale[None, :]
            right = right * by_row[:, None] * right_scale[None, :]
            if GATED:
                left = left * _sigmoid(left) * right
            tma.store_wait(0)
            out_tile.store(left.to(out.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [row, along * STEP], out_tile)
            if not GATED:
                tma.store_wait(0)
                out_tile.store(right.to(out.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(out, [row, along * STEP + COLUMNS], out_tile)
        else:
            for _ in range(INPUTS // DEPTH):
                mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
                mbarrier.arrive(empty.index(step % STAGES))
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
    x_tiles = gl.allocate_shared_memory(rows.dtype, [STAGES, TILE, DEPTH], rows.layout)
    w_tiles = gl.allocate_shared_memory(weight.dtype, [2 * STAGES, COLUMNS, DEPTH], weight.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [2, 64, COLUMNS], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    x_scale,
                    plan,
                    w_scale,
                    out,
                    x_tiles,
                    w_tiles,
                    full,
                    empty,
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
                    x_tiles,
                    w_tiles,
                    full,
                    empty,
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
                (
                    rows,
                    weight,
                    plan,
                    x_tiles,
                    w_tiles,
                    full,
                    empty,
                    INPUTS,
                    OUTPUTS,
                    SECOND,
                    STEP,
                    MANY,
                    GROUP,
                ),
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
    """As `moe_prefill.gate_up`, for tiles of 128 rows; 4 warps."""
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
    """As `moe_prefill.down`, for tiles of 128 rows; 4 warps."""
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
