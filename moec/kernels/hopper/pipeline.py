"""A pipeline for the products of few tokens on sm_90, in Gluon: one warp copies, four multiply.

The copying warp asks the TMA unit (the GPU's copy engine) for tiles of weights and of quantised
inputs, up to STAGES steps ahead. Which weights come first is known before anything has run. So the
warp asks for them before the previous launch has ended, and only the quantised inputs wait for
that launch. At one token a decode step gains just this: memory is read during the small launches
between the products.

A product has the weights as its wide operand and COLUMNS tokens as its narrow one. The columns
after the last token are computed and not used.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class Pipeline(NamedTuple):
    """STAGES slots of shared memory; each holds the tiles of one step along the inputs.

    One step multiplies one tile of weights, or two: of gate and of up.
    """

    x_tiles: gl.shared_memory_descriptor  # quantised inputs [STAGES, COLUMNS, DEPTH]
    w_tiles: gl.shared_memory_descriptor  # weights [tiles per step * STAGES, ROWS, DEPTH]
    full: gl.shared_memory_descriptor  # a barrier per slot: its tiles have arrived
    empty: gl.shared_memory_descriptor  # a barrier per slot: its tiles have been multiplied


@gluon.jit
def allocate(
    x,
    weight,
    STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    EACH: gl.constexpr,
):
    """A pipeline for the descriptors x and weight, with EACH tiles of weights per step."""
    x_tiles = gl.allocate_shared_memory(x.dtype, [STAGES, COLUMNS, DEPTH], x.layout)
    w_tiles = gl.allocate_shared_memory(weight.dtype, [EACH * STAGES, ROWS, DEPTH], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    return Pipeline(x_tiles, w_tiles, full, empty)


@gluon.jit
def _copy_weights(weight, row, second, k, slot, pipe):
    """Ask for the weights of one step; the slot is full when its inputs have arrived too."""
    EACH: gl.constexpr = pipe.w_tiles.shape[0] // pipe.x_tiles.shape[0]
    ROWS: gl.constexpr = pipe.x_tiles.shape[1] + EACH * pipe.w_tiles.shape[1]
    ready = pipe.full.index(slot)
    mbarrier.expect(ready, ROWS * pipe.x_tiles.shape[2])
    tma.async_copy_global_to_shared(weight, [row, k], ready, pipe.w_tiles.index(EACH * slot))
    if EACH > 1:
        tma.async_copy_global_to_shared(
            weight, [row + second, k], ready, pipe.w_tiles.index(EACH * slot + 1)
        )


@gluon.jit
def _copy_step(x, weight, token, row, second, k, step, pipe):
    """Wait until the slot of `step` is empty, then ask for all its tiles."""
    STAGES: gl.constexpr = pipe.x_tiles.shape[0]
    slot = step % STAGES
    mbarrier.wait(pipe.empty.index(slot), (step // STAGES & 1) ^ 1)
    _copy_weights(weight, row, second, k, slot, pipe)
    tma.async_copy_global_to_shared(x, [token, k], pipe.full.index(slot), pipe.x_tiles.index(slot))


@gluon.jit
def copy_first(x, weight, token, row, second, begin, pipe, INPUTS: gl.constexpr):
    """Copy the first product's tiles: INPUTS inputs from `begin`, of the rows from `token`.

    The weights are the rows from `row`, and where a step has two tiles, those from row + second.
    As many weights as fit are asked for before the wait for the previous launch.
    """
    STAGES: gl.constexpr = pipe.x_tiles.shape[0]
    DEPTH: gl.constexpr = pipe.x_tiles.shape[2]
    STEPS: gl.constexpr = INPUTS // DEPTH
    EARLY: gl.constexpr = STAGES if STAGES < STEPS else STEPS
    for step in range(EARLY):
        _copy_weights(weight, row, second, begin + step * DEPTH, step, pipe)
    gdc_wait()
    gdc_launch_dependents()  # not earlier: the next launch would take room from those before it
    for step in range(EARLY):
        tma.async_copy_global_to_shared(
            x, [token, begin + step * DEPTH], pipe.full.index(step), pipe.x_tiles.index(step)
        )
    for step in range(EARLY, STEPS):
        _copy_step(x, weight, token, row, second, begin + step * DEPTH, step, pipe)


@gluon.jit
def copy_next(x, weight, token, row, second, begin, step, pipe, INPUTS: gl.constexpr):
    """Copy the tiles of a further product, whose first step is number `step`."""
    DEPTH: gl.constexpr = pipe.x_tiles.shape[2]
    for k in range(INPUTS // DEPTH):
        _copy_step(x, weight, token, row, second, begin + k * DEPTH, step + k, pipe)


@gluon.jit
def product(step, pipe, SUMS: gl.constexpr, INPUTS: gl.constexpr):
    """The sums over INPUTS inputs, float32 [ROWS, COLUMNS], from step number `step` on.

    Every step's sums are added in float32: the tensor core accumulates FP8 products in fewer bits.
    """
    STAGES: gl.constexpr = pipe.x_tiles.shape[0]
    ROWS: gl.constexpr = pipe.w_tiles.shape[1]
    COLUMNS: gl.constexpr = pipe.x_tiles.shape[1]
    DEPTH: gl.constexpr = pipe.x_tiles.shape[2]
    total = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    part = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    for k in range(INPUTS // DEPTH):
        slot = (step + k) % STAGES
        mbarrier.wait(pipe.full.index(slot), (step + k) // STAGES & 1)
        x = pipe.x_tiles.index(slot).permute((1, 0))
        part = warpgroup_mma(pipe.w_tiles.index(slot), x, part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        mbarrier.arrive(pipe.empty.index(slot))
        total += part
    return total


@gluon.jit
def two_products(step, pipe, SUMS: gl.constexpr, INPUTS: gl.constexpr):
    """Like `product`, with both tiles of weights of each step: two results."""
    STAGES: gl.constexpr = pipe.x_tiles.shape[0]
    ROWS: gl.constexpr = pipe.w_tiles.shape[1]
    COLUMNS: gl.constexpr = pipe.x_tiles.shape[1]
    DEPTH: gl.constexpr = pipe.x_tiles.shape[2]
    left = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    right = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    one = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    two = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    for k in range(INPUTS // DEPTH):
        slot = (step + k) % STAGES
        mbarrier.wait(pipe.full.index(slot), (step + k) // STAGES & 1)
        x = pipe.x_tiles.index(slot).permute((1, 0))
        one = warpgroup_mma(pipe.w_tiles.index(2 * slot), x, one, use_acc=False, is_async=True)
        two = warpgroup_mma(pipe.w_tiles.index(2 * slot + 1), x, two, use_acc=False, is_async=True)
        one, two = warpgroup_mma_wait(0, deps=(one, two))
        mbarrier.arrive(pipe.empty.index(slot))
        left += one
        right += two
    return left, right
