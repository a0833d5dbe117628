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
def barriers(STAGES: gl.constexpr):
    """The barriers of STAGES slots: that a slot is full, and that it is empty."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    return full, empty


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
    gl.static_assert(STAGES >= 4, "`product` holds four slots at once")
    x_tiles = gl.allocate_shared_memory(x.dtype, [STAGES, COLUMNS, DEPTH], x.layout)
    w_tiles = gl.allocate_shared_memory(weight.dtype, [EACH * STAGES, ROWS, DEPTH], weight.layout)
    full, empty = barriers(STAGES)
    return Pipeline(x_tiles, w_tiles, full, empty)


@gluon.jit
def _copy_weights(weight, row, k, slot, pipe, SECOND: gl.constexpr):
    """Ask for the weights of one step; the slot is full when its inputs have arrived too."""
    EACH: gl.constexpr = pipe.w_tiles.shape[0] // pipe.x_tiles.shape[0]
    TILES: gl.constexpr = 2 if SECOND else 1
    ROWS: gl.constexpr = pipe.x_tiles.shape[1] + TILES * pipe.w_tiles.shape[1]
    ready = pipe.full.index(slot)
    mbarrier.expect(ready, ROWS * pipe.x_tiles.shape[2])
    tma.async_copy_global_to_shared(weight, [row, k], ready, pipe.w_tiles.index(EACH * slot))
    if SECOND:
        tma.async_copy_global_to_shared(
            weight, [row + SECOND, k], ready, pipe.w_tiles.index(EACH * slot + 1)
        )


@gluon.jit
def _copy_step(x, weight, token, row, k, step, pipe, SECOND: gl.constexpr):
    """Wait until the slot of `step` is empty, then ask for all its tiles."""
    STAGES: gl.constexpr = pipe.x_tiles.shape[0]
    slot = step % STAGES
    mbarrier.wait(pipe.empty.index(slot), (step // STAGES & 1) ^ 1)
    _copy_weights(weight, row, k, slot, pipe, SECOND)
    tma.async_copy_global_to_shared(x, [token, k], pipe.full.index(slot), pipe.x_tiles.index(slot))


@gluon.jit
def copy_first(x, weight, token, row, begin, pipe, INPUTS: gl.constexpr, SECOND: gl.constexpr = 0):
    """Copy the first product's tiles: INPUTS inputs from `begin`, of the rows from `token`.

    The weights are the rows from `row`, and with SECOND also those from row + SECOND: two tiles.
    As many weights as fit are asked for before the wait for the previous launch.
    """
    STAGES: gl.constexpr = pipe.x_tiles.shape[0]
    DEPTH: gl.constexpr = pipe.x_tiles.shape[2]
    STEPS: gl.constexpr = INPUTS // DEPTH
    EARLY: gl.constexpr = STAGES if STAGES < STEPS else STEPS
    for step in range(EARLY):
        _copy_weights(weight, row, begin + step * DEPTH, step, pipe, SECOND)
    gdc_wait()
    gdc_launch_dependents()  # not earlier: the next launch would take room from those before it
    for step in range(EARLY):
        tma.async_copy_global_to_shared(
            x, [token, begin + step * DEPTH], pipe.full.index(step), pipe.x_tiles.index(step)
        )
    for step in range(EARLY, STEPS):
        _copy_step(x, weight, token, row, begin + step * DEPTH, step, pipe, SECOND)


@gluon.jit
def copy_next(
    x, weight, token, row, begin, step, pipe, INPUTS: gl.constexpr, SECOND: gl.constexpr = 0
):
    """Copy the tiles of a further product, whose first step is number `step`."""
    DEPTH: gl.constexpr = pipe.x_tiles.shape[2]
    for k in range(INPUTS // DEPTH):
        _copy_step(x, weight, token, row, begin + k * DEPTH, step + k, pipe, SECOND)


@gluon.jit
def _start(tile, step, pipe, SUMS: gl.constexpr):
    """Start to multiply the weights `tile` of a step with its inputs, once both have arrived."""
    STAGES: gl.constexpr = pipe.x_tiles.shape[0]
    EACH: gl.constexpr = pipe.w_tiles.shape[0] // STAGES
    ROWS: gl.constexpr = pipe.w_tiles.shape[1]
    COLUMNS: gl.constexpr = pipe.x_tiles.shape[1]
    slot = step % STAGES
    mbarrier.wait(pipe.full.index(slot), step // STAGES & 1)
    x = pipe.x_tiles.index(slot).permute((1, 0))
    weights = pipe.w_tiles.index(EACH * slot + tile)
    none = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    return warpgroup_mma(weights, x, none, use_acc=False, is_async=True)


@gluon.jit
def _end(sums, step, pipe, WAITING: gl.constexpr):
    """The sums of a step after which WAITING products were started; its slot is empty then."""
    found = warpgroup_mma_wait(WAITING, deps=(sums,))
    mbarrier.arrive(pipe.empty.index(step % pipe.x_tiles.shape[0]))
    return found


@gluon.jit
def product(step, pipe, SUMS: gl.constexpr, INPUTS: gl.constexpr):
    """The sums over INPUTS inputs, float32 [ROWS, COLUMNS], from step number `step` on.

    Every step's sums are added in float32: the tensor core accumulates FP8 products in fewer bits.
    A few steps are started together, so that only the last one's result is waited for.
    """
    ROWS: gl.constexpr = pipe.w_tiles.shape[1]
    COLUMNS: gl.constexpr = pipe.x_tiles.shape[1]
    STEPS: gl.constexpr = INPUTS // pipe.x_tiles.shape[2]
    total = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    for k in range(STEPS // 4):
        at = step + 4 * k
        one = _start(0, at, pipe, SUMS)
        two = _start(0, at + 1, pipe, SUMS)
        three = _start(0, at + 2, pipe, SUMS)
        four = _start(0, at + 3, pipe, SUMS)
        total += _end(one, at, pipe, 3)
        total += _end(two, at + 1, pipe, 2)
        total += _end(three, at + 2, pipe, 1)
        total += _end(four, at + 3, pipe, 0)
    for k in range(STEPS - STEPS % 4, STEPS):
        total += _end(_start(0, step + k, pipe, SUMS), step + k, pipe, 0)
    return total


@gluon.jit
def two_products(step, pipe, SUMS: gl.constexpr, INPUTS: gl.constexpr):
    """Like `product`, with both tiles of weights of each step: two results."""
    ROWS: gl.constexpr = pipe.w_tiles.shape[1]
    COLUMNS: gl.constexpr = pipe.x_tiles.shape[1]
    STEPS: gl.constexpr = INPUTS // pipe.x_tiles.shape[2]
    left = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    right = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    for k in range(STEPS // 2):
        at = step + 2 * k
        one = _start(0, at, pipe, SUMS)
        two = _start(1, at, pipe, SUMS)
        three = _start(0, at + 1, pipe, SUMS)
        four = _start(1, at + 1, pipe, SUMS)
        left += warpgroup_mma_wait(3, deps=(one,))
        right += _end(two, at, pipe, 2)
        left += warpgroup_mma_wait(1, deps=(three,))
        right += _end(four, at + 1, pipe, 0)
    if STEPS % 2:
        last = step + STEPS - 1
        one = _start(0, last, pipe, SUMS)
        two = _start(1, last, pipe, SUMS)
        left += warpgroup_mma_wait(1, deps=(one,))
        right += _end(two, last, pipe, 0)
    return left, right


@gluon.jit
def halved_product(step, pipe, SUMS: gl.constexpr, PAIRS: gl.constexpr, INPUTS: gl.constexpr):
    """Like `two_products`, with both tiles of a step as the halves of one: [ROWS, COLUMNS] each.

    So each tile needs just 32 rows, half of what the tensor core takes. PAIRS is a layout for
    [ROWS, COLUMNS, 2] whose threads have both values of a pair.
    """
    STAGES: gl.constexpr = pipe.x_tiles.shape[0]
    ROWS: gl.constexpr = pipe.w_tiles.shape[1]
    COLUMNS: gl.constexpr = pipe.x_tiles.shape[1]
    DEPTH: gl.constexpr = pipe.x_tiles.shape[2]
    tiles = pipe.w_tiles
    whole = tiles._reinterpret(tiles.dtype, [STAGES, 2 * ROWS, DEPTH], tiles.layout)
    both = product(step, Pipeline(pipe.x_tiles, whole, pipe.full, pipe.empty), SUMS, INPUTS)
    pairs = both.reshape((2, ROWS, COLUMNS)).permute((1, 2, 0))
    return gl.convert_layout(pairs, PAIRS).split()
