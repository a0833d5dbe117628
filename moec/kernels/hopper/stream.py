"""Products for few tokens on sm_90, in Gluon: weights stream while what they multiply is made.

One warp asks the copy engine for tiles of weights, STAGES ahead; four warps multiply. Which weights
come first nobody has to be told, so the stream starts before the launch ahead has ended, and only
the tokens' codes wait for it. At one token that is what a step gains: memory works through the
small launches between the products.

Weights are the wide operand, COLUMNS tokens the narrow one; what is beyond the last is not used.
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def _room(
    codes,
    weight,
    STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    EACH: gl.constexpr,
):
    """Slots for tiles, EACH of weights and one of codes, and who may touch them."""
    x_tiles = gl.allocate_shared_memory(codes.dtype, [STAGES, COLUMNS, DEPTH], codes.layout)
    w_tiles = gl.allocate_shared_memory(weight.dtype, [EACH * STAGES, ROWS, DEPTH], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    return x_tiles, w_tiles, full, empty


@gluon.jit
def _ask(weight, row, second, k, slot, w_tiles, full, EACH: gl.constexpr, BYTES: gl.constexpr):
    """One step's weights into a slot, which is full when its codes are there too."""
    ready = full.index(slot)
    mbarrier.expect(ready, BYTES)
    tma.async_copy_global_to_shared(weight, [row, k], ready, w_tiles.index(EACH * slot))
    if EACH > 1:
        tma.async_copy_global_to_shared(
            weight, [row + second, k], ready, w_tiles.index(EACH * slot + 1)
        )


@gluon.jit
def _copy_first(
    codes,
    weight,
    token,
    row,
    second,
    begin,
    x_tiles,
    w_tiles,
    full,
    empty,
    INPUTS: gl.constexpr,
    EACH: gl.constexpr,
):
    """The first INPUTS: as many of the weights as there is room for before the wait."""
    STAGES: gl.constexpr = x_tiles.shape[0]
    DEPTH: gl.constexpr = x_tiles.shape[2]
    BYTES: gl.constexpr = (x_tiles.shape[1] + EACH * w_tiles.shape[1]) * DEPTH
    STEPS: gl.constexpr = INPUTS // DEPTH
    EARLY: gl.constexpr = STAGES if STAGES < STEPS else STEPS
    for step in range(EARLY):
        _ask(weight, row, second, begin + step * DEPTH, step, w_tiles, full, EACH, BYTES)
    gdc_wait()
    gdc_launch_dependents()  # not before: the next would take room from those ahead
    for step in range(EARLY):
        tma.async_copy_global_to_shared(
            codes, [token, begin + step * DEPTH], full.index(step), x_tiles.index(step)
        )
    for step in range(EARLY, STEPS):
        _copy_step(
            codes,
            weight,
            token,
            row,
            second,
            begin + step * DEPTH,
            step,
            x_tiles,
            w_tiles,
            full,
            empty,
            EACH,
            BYTES,
        )


@gluon.jit
def _copy_step(
    codes,
    weight,
    token,
    row,
    second,
    k,
    step,
    x_tiles,
    w_tiles,
    full,
    empty,
    EACH: gl.constexpr,
    BYTES: gl.constexpr,
):
    STAGES: gl.constexpr = x_tiles.shape[0]
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
    _ask(weight, row, second, k, slot, w_tiles, full, EACH, BYTES)
    tma.async_copy_global_to_shared(codes, [token, k], full.index(slot), x_tiles.index(slot))


@gluon.jit
def _copy_more(
    codes,
    weight,
    token,
    row,
    second,
    begin,
    step,
    x_tiles,
    w_tiles,
    full,
    empty,
    INPUTS: gl.constexpr,
    EACH: gl.constexpr,
):
    DEPTH: gl.constexpr = x_tiles.shape[2]
    BYTES: gl.constexpr = (x_tiles.shape[1] + EACH * w_tiles.shape[1]) * DEPTH
    for k in range(INPUTS // DEPTH):
        _copy_step(
            codes,
            weight,
            token,
            row,
            second,
            begin + k * DEPTH,
            step + k,
            x_tiles,
            w_tiles,
            full,
            empty,
            EACH,
            BYTES,
        )


@gluon.jit
def _product(step, x_tiles, w_tiles, full, empty, SUMS: gl.constexpr, INPUTS: gl.constexpr):
    """The sums of INPUTS, [ROWS, COLUMNS]: every 128 to float32, the tensor core has fewer bits."""
    STAGES: gl.constexpr = x_tiles.shape[0]
    ROWS: gl.constexpr = w_tiles.shape[1]
    COLUMNS: gl.constexpr = x_tiles.shape[1]
    DEPTH: gl.constexpr = x_tiles.shape[2]
    total = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    part = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    for k in range(INPUTS // DEPTH):
        slot = (step + k) % STAGES
        mbarrier.wait(full.index(slot), (step + k) // STAGES & 1)
        x = x_tiles.index(slot).permute((1, 0))
        part = warpgroup_mma(w_tiles.index(slot), x, part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        mbarrier.arrive(empty.index(slot))
        total += part
    return total


@gluon.jit
def _two_products(step, x_tiles, w_tiles, full, empty, SUMS: gl.constexpr, INPUTS: gl.constexpr):
    """As `_product`, of both tiles of weights in a slot."""
    STAGES: gl.constexpr = x_tiles.shape[0]
    ROWS: gl.constexpr = w_tiles.shape[1]
    COLUMNS: gl.constexpr = x_tiles.shape[1]
    DEPTH: gl.constexpr = x_tiles.shape[2]
    left = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    right = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    one = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    two = gl.zeros((ROWS, COLUMNS), gl.float32, SUMS)
    for k in range(INPUTS // DEPTH):
        slot = (step + k) % STAGES
        mbarrier.wait(full.index(slot), (step + k) // STAGES & 1)
        x = x_tiles.index(slot).permute((1, 0))
        one = warpgroup_mma(w_tiles.index(2 * slot), x, one, use_acc=False, is_async=True)
        two = warpgroup_mma(w_tiles.index(2 * slot + 1), x, two, use_acc=False, is_async=True)
        one, two = warpgroup_mma_wait(0, deps=(one, two))
        mbarrier.arrive(empty.index(slot))
        left += one
        right += two
    return left, right


@gluon.jit
def _copy_linear(codes, weight, x_tiles, w_tiles, full, empty, DIM: gl.constexpr):
    row = gl.program_id(0) * w_tiles.shape[1]
    _copy_first(codes, weight, 0, row, 0, 0, x_tiles, w_tiles, full, empty, DIM, 1)


@gluon.jit
def _sum_linear(
    scale,
    weight_scale,
    out,
    tokens,
    x_tiles,
    w_tiles,
    full,
    empty,
    WIDTH: gl.constexpr,
    DIM: gl.constexpr,
):
    ROWS: gl.constexpr = w_tiles.shape[1]
    COLUMNS: gl.constexpr = x_tiles.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    column = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    token = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUMS))
    used = token < tokens
    by_row = gl.load(weight_scale + column)
    gdc_wait()
    by_token = gl.load(scale + token, mask=used, other=0.0)
    total = _product(0, x_tiles, w_tiles, full, empty, SUMS, DIM)
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
    """As `linear.linear`; descriptors: codes, weight."""
    x_tiles, w_tiles, full, empty = _room(codes, weight, STAGES, COLUMNS, ROWS, DEPTH, 1)
    gl.warp_specialize(
        [
            (
                _sum_linear,
                (
                    scale,
                    weight_scale,
                    out,
                    tokens,
                    x_tiles,
                    w_tiles,
                    full,
                    empty,
                    WIDTH,
                    DIM,
                ),
            ),
            (_copy_linear, (codes, weight, x_tiles, w_tiles, full, empty, DIM)),
        ],
        [1],
        [40],
    )


@gluon.jit
def _choices(
    logits,
    tokens,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    COLUMNS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The expert of each token, the first of the best as in topk, and the largest logit."""
    LOADED: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    token = gl.arange(0, COLUMNS, gl.SliceLayout(1, LOADED))
    expert = gl.arange(0, EXPERTS_2, gl.SliceLayout(0, LOADED))
    inside = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    rows = gl.load(
        logits + token[:, None] * EXPERTS + expert[None, :],
        mask=inside,
        other=float("-inf"),
        cache_modifier=".cg",
    )
    best = gl.max(rows, 1)
    chosen = gl.min(gl.where(rows == best[:, None], expert[None, :], EXPERTS - 1), 1)
    return gl.where(token < tokens, chosen, -1), best, token


@gluon.jit
def _expert(chosen, token, slot):
    """The expert of a slot, and whether no slot before has it: there is one for each token."""
    mine = gl.sum(gl.where(token == slot, chosen, 0), 0)
    return mine, gl.min(gl.where(chosen == mine, token, 1 << 20), 0) == slot


@gluon.jit
def _copy_gate_up(
    logits,
    codes,
    weight,
    tokens,
    x_tiles,
    w_tiles,
    full,
    empty,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
):
    """The shared expert's weights, then those that the tokens chose."""
    row = gl.program_id(0) * w_tiles.shape[1]
    _copy_first(
        codes,
        weight,
        0,
        EXPERTS * (2 * HIDDEN) + row,
        HIDDEN,
        0,
        x_tiles,
        w_tiles,
        full,
        empty,
        DIM,
        2,
    )
    step = DIM // x_tiles.shape[2]
    chosen, _, token = _choices(logits, tokens, EXPERTS, EXPERTS_2, x_tiles.shape[1], 1)
    for slot in range(tokens):
        expert, live = _expert(chosen, token, slot)
        if live:
            _copy_more(
                codes,
                weight,
                0,
                expert * (2 * HIDDEN) + row,
                HIDDEN,
                0,
                step,
                x_tiles,
                w_tiles,
                full,
                empty,
                DIM,
                2,
            )
            step += DIM // x_tiles.shape[2]


@gluon.jit
def _swiglu(
    scale,
    weight_scale,
    act,
    largest,
    served,
    shared_row,
    row,
    step,
    x_tiles,
    w_tiles,
    full,
    empty,
    SUMS: gl.constexpr,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
):
    """What an expert, whose first row of outputs `row` is, makes of the tokens that it serves."""
    ROWS: gl.constexpr = w_tiles.shape[1]
    out = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    token = gl.arange(0, x_tiles.shape[1], gl.SliceLayout(0, SUMS))
    gate_scale = gl.load(weight_scale + row + out)
    up_scale = gl.load(weight_scale + row + HIDDEN + out)
    gate, up = _two_products(step, x_tiles, w_tiles, full, empty, SUMS, DIM)
    gate = gate * gate_scale[:, None] * scale[None, :]
    up = up * up_scale[:, None] * scale[None, :]
    done = (gate / (1 + gl.exp(-gate)) * up).to(gl.bfloat16)
    at = shared_row + token
    gl.store(act + at[None, :] * HIDDEN + out[:, None], done, mask=served[None, :])
    most = gl.max(gl.abs(done.to(gl.float32)), 0)  # bits of floats of one sign sort as they do
    gl.atomic_max(largest + at, most.to(gl.int32, bitcast=True), mask=served, sem="relaxed")


@gluon.jit
def _sum_gate_up(
    logits,
    scale,
    weight_scale,
    act,
    largest,
    tokens,
    x_tiles,
    w_tiles,
    full,
    empty,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
):
    COLUMNS: gl.constexpr = x_tiles.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    token = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUMS))
    used = token < tokens
    gdc_wait()
    by_token = gl.load(scale + token, mask=used, other=0.0)
    _swiglu(
        by_token,
        weight_scale,
        act,
        largest,
        used,
        tokens,
        EXPERTS * (2 * HIDDEN),
        0,
        x_tiles,
        w_tiles,
        full,
        empty,
        SUMS,
        DIM,
        HIDDEN,
    )
    step = DIM // x_tiles.shape[2]
    chosen, best, order = _choices(logits, tokens, EXPERTS, EXPERTS_2, COLUMNS, 4)
    score = (1 / (1 + gl.exp(-best))).to(gl.bfloat16).to(gl.float32)
    by_token *= gl.convert_layout(score, gl.SliceLayout(0, SUMS))
    placed = gl.convert_layout(chosen, gl.SliceLayout(0, SUMS))
    for slot in range(tokens):
        expert, live = _expert(chosen, order, slot)
        if live:
            _swiglu(
                by_token,
                weight_scale,
                act,
                largest,
                placed == expert,
                0,
                expert * (2 * HIDDEN),
                step,
                x_tiles,
                w_tiles,
                full,
                empty,
                SUMS,
                DIM,
                HIDDEN,
            )
            step += DIM // x_tiles.shape[2]


@gluon.jit(do_not_specialize=["tokens"])
def gate_up(
    logits,
    codes,
    scale,
    weight,
    weight_scale,
    act,
    largest,
    tokens,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    COLUMNS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid (hidden / ROWS): as `moe_decode.gate_up`, for COLUMNS tokens at most.

    Descriptors: codes, weight. A program goes through all experts, the shared one first, whose
    weights come before anyone has chosen.
    """
    x_tiles, w_tiles, full, empty = _room(codes, weight, STAGES, COLUMNS, ROWS, DEPTH, 2)
    gl.warp_specialize(
        [
            (
                _sum_gate_up,
                (
                    logits,
                    scale,
                    weight_scale,
                    act,
                    largest,
                    tokens,
                    x_tiles,
                    w_tiles,
                    full,
                    empty,
                    DIM,
                    HIDDEN,
                    EXPERTS,
                    EXPERTS_2,
                ),
            ),
            (
                _copy_gate_up,
                (
                    logits,
                    codes,
                    weight,
                    tokens,
                    x_tiles,
                    w_tiles,
                    full,
                    empty,
                    DIM,
                    HIDDEN,
                    EXPERTS,
                    EXPERTS_2,
                ),
            ),
        ],
        [1],
        [40],
    )


@gluon.jit
def _copy_down(
    logits,
    act_codes,
    weight,
    tokens,
    x_tiles,
    w_tiles,
    full,
    empty,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    SPLIT: gl.constexpr,
):
    row = gl.program_id(0) * w_tiles.shape[1]
    begin = gl.program_id(1) * (HIDDEN // SPLIT)
    _copy_first(
        act_codes,
        weight,
        tokens,
        EXPERTS * DIM + row,
        0,
        begin,
        x_tiles,
        w_tiles,
        full,
        empty,
        HIDDEN // SPLIT,
        1,
    )
    step = HIDDEN // SPLIT // x_tiles.shape[2]
    chosen, _, token = _choices(logits, tokens, EXPERTS, EXPERTS_2, x_tiles.shape[1], 1)
    for slot in range(tokens):
        expert, live = _expert(chosen, token, slot)
        if live:
            _copy_more(
                act_codes,
                weight,
                0,
                expert * DIM + row,
                0,
                begin,
                step,
                x_tiles,
                w_tiles,
                full,
                empty,
                HIDDEN // SPLIT,
                1,
            )
            step += HIDDEN // SPLIT // x_tiles.shape[2]


@gluon.jit
def _act_scale(largest, at, used):
    most = gl.load(largest + at, mask=used, other=0).to(gl.float32, bitcast=True)
    return gl.where(used, gl.maximum(most / 448.0, 1e-12), 0.0)


@gluon.jit
def _sum_down(
    logits,
    largest,
    weight_scale,
    parts,
    tokens,
    x_tiles,
    w_tiles,
    full,
    empty,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    SPLIT: gl.constexpr,
):
    ROWS: gl.constexpr = w_tiles.shape[1]
    COLUMNS: gl.constexpr = x_tiles.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    INPUTS: gl.constexpr = HIDDEN // SPLIT
    column = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    token = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUMS))
    used = token < tokens
    by_row = gl.load(weight_scale + EXPERTS * DIM + column)
    gdc_wait()
    shared = _act_scale(largest, tokens + token, used)
    routed = _act_scale(largest, token, used)
    total = _product(0, x_tiles, w_tiles, full, empty, SUMS, INPUTS)
    total = total * by_row[:, None] * shared[None, :]
    step = INPUTS // x_tiles.shape[2]
    chosen, _, order = _choices(logits, tokens, EXPERTS, EXPERTS_2, COLUMNS, 4)
    placed = gl.convert_layout(chosen, gl.SliceLayout(0, SUMS))
    for slot in range(tokens):
        expert, live = _expert(chosen, order, slot)
        if live:
            by_row = gl.load(weight_scale + expert * DIM + column)
            more = _product(step, x_tiles, w_tiles, full, empty, SUMS, INPUTS)
            more = more * by_row[:, None] * routed[None, :]
            total += gl.where((placed == expert)[None, :], more, 0.0)
            step += INPUTS // x_tiles.shape[2]
    at = parts + (gl.program_id(1) * tokens + token[None, :]) * DIM + column[:, None]
    gl.store(at, total, mask=used[None, :])


@gluon.jit(do_not_specialize=["tokens"])
def down(
    logits,
    act_codes,
    largest,
    weight,
    weight_scale,
    parts,
    tokens,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    SPLIT: gl.constexpr,
    COLUMNS: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid (dim / ROWS, SPLIT): as `moe_decode.down`, for COLUMNS tokens at most.

    Descriptors: act_codes, weight. Writes parts, float32 [SPLIT, tokens, dim], each of a share of
    the inputs, of the shared expert and the token's own.
    """
    x_tiles, w_tiles, full, empty = _room(act_codes, weight, STAGES, COLUMNS, ROWS, DEPTH, 1)
    gl.warp_specialize(
        [
            (
                _sum_down,
                (
                    logits,
                    largest,
                    weight_scale,
                    parts,
                    tokens,
                    x_tiles,
                    w_tiles,
                    full,
                    empty,
                    DIM,
                    HIDDEN,
                    EXPERTS,
                    EXPERTS_2,
                    SPLIT,
                ),
            ),
            (
                _copy_down,
                (
                    logits,
                    act_codes,
                    weight,
                    tokens,
                    x_tiles,
                    w_tiles,
                    full,
                    empty,
                    DIM,
                    HIDDEN,
                    EXPERTS,
                    EXPERTS_2,
                    SPLIT,
                ),
            ),
        ],
        [1],
        [40],
    )
