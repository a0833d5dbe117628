"""The two products of an MoE layer of any routing for one token on sm_90, in Gluon.

One token's layer is so short that arithmetic takes as long as memory does, unless the tensor core
does it. Weights are its wide operand; the narrow one has eight columns, the least that there are.

    gate_up   a program has 32 outputs of gate and as many of up, of one expert; the first column is
              the token, the others are empty
    down      a program has ROWS outputs of all experts at once: its tile of weights is ROWS outputs
              of each of eight slots, one below the other, and the columns are the slots' quantised
              inputs. It multiplies each slot with all columns, and uses those of its own

Shared memory holds all weights of a program of `down`, which asks for them while `gate_up` runs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moec.kernels.hopper.arithmetic import sigmoid
from moec.kernels.hopper.choice import expert_of, slots_of
from moec.kernels.hopper.pipeline import (
    Pipeline,
    allocate,
    barriers,
    copy_next,
    halved_product,
    product,
)

#: experts that a program takes at once: the rows of a tile of the tensor core, by ROWS
SLOTS = gl.constexpr(8)


@gluon.jit
def _copy_gate_up(
    chosen,
    logits,
    codes,
    weight,
    pipe,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    TOP_K: gl.constexpr,
    CHOSEN: gl.constexpr,
):
    """The copying warp of `gate_up`."""
    slot = gl.program_id(1)
    gdc_wait()
    gdc_launch_dependents()  # not earlier: `down` reads the choices without a wait of its own
    expert = expert_of(slot, chosen, logits, EXPERTS, EXPERTS_2, TOP_K, CHOSEN, 1)
    row = expert * (2 * HIDDEN) + gl.program_id(0) * pipe.w_tiles.shape[1]
    copy_next(codes, weight, 0, row, 0, 0, pipe, DIM, HIDDEN)


@gluon.jit
def _multiply_gate_up(
    chosen,
    logits,
    scale,
    weight_scale,
    act,
    largest,
    pipe,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    TOP_K: gl.constexpr,
    CHOSEN: gl.constexpr,
):
    """The multiplying warps of `gate_up`."""
    ROWS: gl.constexpr = pipe.w_tiles.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 32])
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 1, 2], [8, 4, 1], [4, 1, 1], [2, 1, 0])
    LAID: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0])
    slot = gl.program_id(1)
    out = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAID))
    first = gl.arange(0, SLOTS, gl.SliceLayout(0, LAID)) == 0
    gdc_wait()
    expert = expert_of(slot, chosen, logits, EXPERTS, EXPERTS_2, TOP_K, CHOSEN, 4)
    by_token = gl.load(scale)
    scales = weight_scale + expert * (2 * HIDDEN) + out
    gate_scale, up_scale = gl.load(scales), gl.load(scales + HIDDEN)
    gate, up = halved_product(0, pipe, SUMS, PAIRS, DIM)
    gate, up = gl.convert_layout(gate, LAID), gl.convert_layout(up, LAID)
    gate = gl.sum(gl.where(first[None, :], gate, 0.0), 1) * gate_scale * by_token
    up = gl.sum(gl.where(first[None, :], up, 0.0), 1) * up_scale * by_token
    done = (gate * sigmoid(gate) * up).to(gl.bfloat16)
    gl.store(act + slot * HIDDEN + out, done)
    most = gl.max(gl.abs(done.to(gl.float32)), 0)  # bits of floats of one sign sort as they do
    gl.atomic_max(largest + slot, most.to(gl.int32, bitcast=True), sem="relaxed")


@gluon.jit
def gate_up(
    chosen,
    logits,
    codes,
    scale,
    weight,
    weight_scale,
    act,
    largest,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    TOP_K: gl.constexpr,
    CHOSEN: gl.constexpr,
    COLUMNS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Like `gate_up` in `moec.kernels.triton.routed_one`.

    Grid (hidden / ROWS, slots), ROWS 32. Descriptors: codes, weight.
    """
    pipe = allocate(codes, weight, STAGES, COLUMNS, ROWS, DEPTH, 2)
    gl.warp_specialize(
        [
            (
                _multiply_gate_up,
                (
                    chosen,
                    logits,
                    scale,
                    weight_scale,
                    act,
                    largest,
                    pipe,
                    DIM,
                    HIDDEN,
                    EXPERTS,
                    EXPERTS_2,
                    TOP_K,
                    CHOSEN,
                ),
            ),
            (
                _copy_gate_up,
                (
                    chosen,
                    logits,
                    codes,
                    weight,
                    pipe,
                    DIM,
                    HIDDEN,
                    EXPERTS,
                    EXPERTS_2,
                    TOP_K,
                    CHOSEN,
                ),
            ),
        ],
        [1],
        [40],
    )


@gluon.jit
def _copy_down(
    chosen,
    given,
    logits,
    weight,
    tiles,
    pipe,
    DIM: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    TOP_K: gl.constexpr,
    SHARED: gl.constexpr,
    SCORE: gl.constexpr,
    NORMALISE: gl.constexpr,
    FACTOR: gl.constexpr,
    CHOSEN: gl.constexpr,
):
    """The copying warp of `down`: the program's outputs of every slot's expert."""
    STEPS: gl.constexpr = pipe.x_tiles.shape[0]
    ROWS: gl.constexpr = tiles.shape[1]
    DEPTH: gl.constexpr = tiles.shape[2]
    # choices are there: `gate_up` waited for them before it let this launch start
    experts, _ = slots_of(
        chosen,
        given,
        logits,
        EXPERTS,
        EXPERTS_2,
        TOP_K,
        SHARED,
        SCORE,
        NORMALISE,
        FACTOR,
        CHOSEN,
        1,
    )
    first = gl.program_id(0) * ROWS
    for step in range(STEPS):
        ready = pipe.full.index(step)
        mbarrier.expect(ready, len(experts) * ROWS * DEPTH)
        for slot in gl.static_range(len(experts)):
            row = experts[slot] * DIM + first
            tile = tiles.index(SLOTS * step + slot)
            tma.async_copy_global_to_shared(weight, [row, step * DEPTH], ready, tile)
    gdc_wait()
    gdc_launch_dependents()


@gluon.jit
def _spread(values, slot):
    """For each element of `slot`, its number in a tuple of one for each slot; else the first."""
    found = values[0] + gl.zeros_like(slot).to(values[0].dtype)
    for i in gl.static_range(1, len(values)):
        found = gl.where(slot == i, values[i], found)
    return found


@gluon.jit
def _scale(largest, slot, many):
    """The scale of a slot's quantised values, from their largest magnitude."""
    most = gl.load(largest + slot, mask=slot < many, other=0).to(gl.float32, bitcast=True)
    return gl.maximum(most / 448.0, 1e-12)


@gluon.jit
def _encode(act, largest, pipe, many, HIDDEN: gl.constexpr):
    """Quantise what SwiGLU gave, act [slots, HIDDEN], into the columns of all steps."""
    STEPS: gl.constexpr = pipe.x_tiles.shape[0]
    DEPTH: gl.constexpr = pipe.x_tiles.shape[2]
    LAID: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    slot = gl.arange(0, SLOTS, gl.SliceLayout(1, LAID))
    at = gl.arange(0, DEPTH, gl.SliceLayout(0, LAID))
    place = act + slot[:, None] * HIDDEN + at[None, :]
    scale = _scale(largest, slot, many)
    rows = ()
    for step in gl.static_range(STEPS):  # all are under way before the first is used
        row = gl.load(place + step * DEPTH, mask=(slot < many)[:, None], other=0.0)
        rows = rows + (row,)
    for step in gl.static_range(STEPS):
        codes = (rows[step].to(gl.float32) / scale[:, None]).to(gl.float8e4nv)
        pipe.x_tiles.index(step).store(codes)
    fence_async_shared()


@gluon.jit
def _multiply_down(
    chosen,
    given,
    logits,
    act,
    largest,
    weight_scale,
    out,
    pipe,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    TOP_K: gl.constexpr,
    SHARED: gl.constexpr,
    SCORE: gl.constexpr,
    NORMALISE: gl.constexpr,
    FACTOR: gl.constexpr,
    CHOSEN: gl.constexpr,
):
    """The multiplying warps of `down`."""
    ROWS: gl.constexpr = pipe.w_tiles.shape[1] // SLOTS
    MANY: gl.constexpr = TOP_K + SHARED
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 32])
    OUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    experts, weights = slots_of(
        chosen,
        given,
        logits,
        EXPERTS,
        EXPERTS_2,
        TOP_K,
        SHARED,
        SCORE,
        NORMALISE,
        FACTOR,
        CHOSEN,
        4,
    )
    place = gl.arange(0, SLOTS * ROWS, gl.SliceLayout(1, SUMS))
    slot, column = place // ROWS, gl.arange(0, SLOTS, gl.SliceLayout(0, SUMS))
    live = slot < MANY
    first = gl.program_id(0) * ROWS
    at = weight_scale + _spread(experts, slot) * DIM + first + place % ROWS
    factor = gl.load(at, mask=live, other=0.0) * _spread(weights, slot)
    gdc_wait()
    _encode(act, largest, pipe, MANY, HIDDEN)
    factor *= _scale(largest, slot, MANY)
    sums = product(0, pipe, SUMS, HIDDEN)
    diagonal = gl.sum(gl.where(slot[:, None] == column[None, :], sums, 0.0), 1)
    by_slot = gl.where(live, diagonal * factor, 0.0).reshape((SLOTS, ROWS))
    total = gl.convert_layout(gl.sum(by_slot, 0), OUT)
    gl.store(out + first + gl.arange(0, ROWS, OUT), total.to(gl.bfloat16))


@gluon.jit
def down(
    chosen,
    given,
    logits,
    act,
    largest,
    weight,
    weight_scale,
    out,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    TOP_K: gl.constexpr,
    SHARED: gl.constexpr,
    SCORE: gl.constexpr,
    NORMALISE: gl.constexpr,
    FACTOR: gl.constexpr,
    CHOSEN: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
):
    """Like `down` in `moec.kernels.triton.routed_one`, for at most SLOTS experts.

    Grid (dim / ROWS). Descriptor: weight.
    """
    STEPS: gl.constexpr = HIDDEN // DEPTH
    tiles = gl.allocate_shared_memory(weight.dtype, [SLOTS * STEPS, ROWS, DEPTH], weight.layout)
    whole = tiles._reinterpret(weight.dtype, [STEPS, SLOTS * ROWS, DEPTH], weight.layout)
    x_tiles = gl.allocate_shared_memory(weight.dtype, [STEPS, SLOTS, DEPTH], weight.layout)
    full, empty = barriers(STEPS)
    pipe = Pipeline(x_tiles, whole, full, empty)
    gl.warp_specialize(
        [
            (
                _multiply_down,
                (
                    chosen,
                    given,
                    logits,
                    act,
                    largest,
                    weight_scale,
                    out,
                    pipe,
                    DIM,
                    HIDDEN,
                    EXPERTS,
                    EXPERTS_2,
                    TOP_K,
                    SHARED,
                    SCORE,
                    NORMALISE,
                    FACTOR,
                    CHOSEN,
                ),
            ),
            (
                _copy_down,
                (
                    chosen,
                    given,
                    logits,
                    weight,
                    tiles,
                    pipe,
                    DIM,
                    EXPERTS,
                    EXPERTS_2,
                    TOP_K,
                    SHARED,
                    SCORE,
                    NORMALISE,
                    FACTOR,
                    CHOSEN,
                ),
            ),
        ],
        [1],
        [40],
    )
