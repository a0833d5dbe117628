"""The two products of the decode MoE layer on sm_90, in Gluon; weights come through a `Pipeline`.

Every program goes through all experts that a token chose: the shared expert first, whose weights
can be copied before any token has chosen, then the routed ones. There is a slot for each token; a
slot whose expert an earlier slot has already served is skipped. Where a layer is narrow, as the
part of a rank is, a program of `gate_up` has 32 outputs and not 64, and two groups of programs may
share the experts, so that all multiprocessors have work.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moec.kernels.hopper.pipeline import (
    allocate,
    copy_first,
    copy_next,
    halved_product,
    product,
    two_products,
)


@gluon.jit
def _choose(
    logits,
    tokens,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    COLUMNS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Each token's expert (the first of the best, as in topk), its logit, and the token's index."""
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
    """The expert of a slot, and whether no earlier slot has it."""
    mine = gl.sum(gl.where(token == slot, chosen, 0), 0)
    return mine, gl.min(gl.where(chosen == mine, token, 1 << 20), 0) == slot


@gluon.jit
def _copy_gate_up(
    logits,
    codes,
    weight,
    tokens,
    pipe,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """The copying warp of `gate_up`."""
    row = gl.program_id(0) * pipe.w_tiles.shape[1]
    group = gl.program_id(1)
    step = 0
    if group == 0:
        copy_first(codes, weight, 0, EXPERTS * (2 * HIDDEN) + row, 0, pipe, DIM, HIDDEN)
        step += DIM // pipe.x_tiles.shape[2]
    else:
        gdc_wait()
        gdc_launch_dependents()
    chosen, _, token = _choose(logits, tokens, EXPERTS, EXPERTS_2, pipe.x_tiles.shape[1], 1)
    turn = 1  # the shared expert was the first
    for slot in range(tokens):
        expert, live = _expert(chosen, token, slot)
        if live:
            if turn % GROUPS == group:
                first = expert * (2 * HIDDEN) + row
                copy_next(codes, weight, 0, first, 0, step, pipe, DIM, HIDDEN)
                step += DIM // pipe.x_tiles.shape[2]
            turn += 1


@gluon.jit
def _swiglu(
    scale,
    weight_scale,
    act,
    largest,
    served,
    first,
    row,
    step,
    pipe,
    LAID: gl.constexpr,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
):
    """Write the SwiGLU of one expert for the tokens that it serves, and its largest magnitudes.

    The expert's weights start at row `row`; the result of token t goes to row first + t of act.
    `LAID` is the layout of the result, [ROWS, COLUMNS]; scale and served are laid as its columns.
    """
    ROWS: gl.constexpr = pipe.w_tiles.shape[1]
    out = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAID))
    token = gl.arange(0, pipe.x_tiles.shape[1], gl.SliceLayout(0, LAID))
    gate_scale = gl.load(weight_scale + row + out)
    up_scale = gl.load(weight_scale + row + HIDDEN + out)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, pipe.x_tiles.shape[1], 32])
    if ROWS == 64:
        gate, up = two_products(step, pipe, SUMS, DIM)
    else:
        PAIRS: gl.constexpr = gl.BlockedLayout([1, 1, 2], [8, 4, 1], [4, 1, 1], [2, 1, 0])
        gate, up = halved_product(step, pipe, SUMS, PAIRS, DIM)
        gate, up = gl.convert_layout(gate, LAID), gl.convert_layout(up, LAID)
    gate = gate * gate_scale[:, None] * scale[None, :]
    up = up * up_scale[:, None] * scale[None, :]
    done = (gate / (1 + gl.exp(-gate)) * up).to(gl.bfloat16)
    at = first + token
    gl.store(act + at[None, :] * HIDDEN + out[:, None], done, mask=served[None, :])
    most = gl.max(gl.abs(done.to(gl.float32)), 0)  # bits of floats of one sign sort as they do
    gl.atomic_max(largest + at, most.to(gl.int32, bitcast=True), mask=served, sem="relaxed")


@gluon.jit
def _multiply_gate_up(
    logits,
    scale,
    weight_scale,
    act,
    largest,
    tokens,
    pipe,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """The multiplying warps of `gate_up`."""
    COLUMNS: gl.constexpr = pipe.x_tiles.shape[1]
    if pipe.w_tiles.shape[1] == 64:
        LAID: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    else:
        LAID: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    token = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAID))
    used = token < tokens
    group = gl.program_id(1)
    gdc_wait()
    by_token = gl.load(scale + token, mask=used, other=0.0)
    step = 0
    if group == 0:
        row = EXPERTS * (2 * HIDDEN)
        _swiglu(by_token, weight_scale, act, largest, used, tokens, row, 0, pipe, LAID, DIM, HIDDEN)
        step += DIM // pipe.x_tiles.shape[2]
    chosen, best, order = _choose(logits, tokens, EXPERTS, EXPERTS_2, COLUMNS, 4)
    score = (1 / (1 + gl.exp(-best))).to(gl.bfloat16).to(gl.float32)
    by_token *= gl.convert_layout(score, gl.SliceLayout(0, LAID))
    placed = gl.convert_layout(chosen, gl.SliceLayout(0, LAID))
    turn = 1
    for slot in range(tokens):
        expert, live = _expert(chosen, order, slot)
        if live:
            if turn % GROUPS == group:
                served, at = placed == expert, expert * (2 * HIDDEN)
                _swiglu(
                    by_token,
                    weight_scale,
                    act,
                    largest,
                    served,
                    0,
                    at,
                    step,
                    pipe,
                    LAID,
                    DIM,
                    HIDDEN,
                )
                step += DIM // pipe.x_tiles.shape[2]
            turn += 1


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
    GROUPS: gl.constexpr,
):
    """Like `gate_up` in `moec.kernels.triton.moe_decode_products`, for at most COLUMNS tokens.

    Grid (hidden / ROWS, GROUPS), ROWS 64 or 32. Descriptors: codes, weight. The first group has the
    shared expert; the groups take the others in turns.
    """
    pipe = allocate(codes, weight, STAGES, COLUMNS, ROWS, DEPTH, 2)
    gl.warp_specialize(
        [
            (
                _multiply_gate_up,
                (
                    logits,
                    scale,
                    weight_scale,
                    act,
                    largest,
                    tokens,
                    pipe,
                    DIM,
                    HIDDEN,
                    EXPERTS,
                    EXPERTS_2,
                    GROUPS,
                ),
            ),
            (
                _copy_gate_up,
                (logits, codes, weight, tokens, pipe, DIM, HIDDEN, EXPERTS, EXPERTS_2, GROUPS),
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
    pipe,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """The copying warp of `down`."""
    INPUTS: gl.constexpr = HIDDEN // SPLIT
    row = gl.program_id(0) * pipe.w_tiles.shape[1]
    begin = gl.program_id(1) * INPUTS
    copy_first(act_codes, weight, tokens, EXPERTS * DIM + row, begin, pipe, INPUTS)
    step = INPUTS // pipe.x_tiles.shape[2]
    chosen, _, token = _choose(logits, tokens, EXPERTS, EXPERTS_2, pipe.x_tiles.shape[1], 1)
    for slot in range(tokens):
        expert, live = _expert(chosen, token, slot)
        if live:
            copy_next(act_codes, weight, 0, expert * DIM + row, begin, step, pipe, INPUTS)
            step += INPUTS // pipe.x_tiles.shape[2]


@gluon.jit
def _act_scale(largest, at, used):
    """The per-token scale of the quantised activations, from their largest magnitude."""
    most = gl.load(largest + at, mask=used, other=0).to(gl.float32, bitcast=True)
    return gl.where(used, gl.maximum(most / 448.0, 1e-12), 0.0)


@gluon.jit
def _multiply_down(
    logits,
    largest,
    weight_scale,
    parts,
    tokens,
    pipe,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """The multiplying warps of `down`."""
    INPUTS: gl.constexpr = HIDDEN // SPLIT
    ROWS: gl.constexpr = pipe.w_tiles.shape[1]
    COLUMNS: gl.constexpr = pipe.x_tiles.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    column = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    token = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUMS))
    used = token < tokens
    by_row = gl.load(weight_scale + EXPERTS * DIM + column)
    gdc_wait()
    shared = _act_scale(largest, tokens + token, used)
    routed = _act_scale(largest, token, used)
    total = product(0, pipe, SUMS, INPUTS)
    total = total * by_row[:, None] * shared[None, :]
    step = INPUTS // pipe.x_tiles.shape[2]
    chosen, _, order = _choose(logits, tokens, EXPERTS, EXPERTS_2, COLUMNS, 4)
    placed = gl.convert_layout(chosen, gl.SliceLayout(0, SUMS))
    for slot in range(tokens):
        expert, live = _expert(chosen, order, slot)
        if live:
            by_row = gl.load(weight_scale + expert * DIM + column)
            more = product(step, pipe, SUMS, INPUTS)
            more = more * by_row[:, None] * routed[None, :]
            total += gl.where((placed == expert)[None, :], more, 0.0)
            step += INPUTS // pipe.x_tiles.shape[2]
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
    """Like `down` in `moec.kernels.triton.moe_decode_products`, for at most COLUMNS tokens.

    Grid (dim / ROWS, SPLIT). Descriptors: act_codes, weight. Each split takes hidden / SPLIT of the
    inputs. It writes one partial sum, float32 [tokens, dim] of parts [SPLIT, tokens, dim]: of the
    shared expert and of each token's own together.
    """
    pipe = allocate(act_codes, weight, STAGES, COLUMNS, ROWS, DEPTH, 1)
    gl.warp_specialize(
        [
            (
                _multiply_down,
                (
                    logits,
                    largest,
                    weight_scale,
                    parts,
                    tokens,
                    pipe,
                    DIM,
                    HIDDEN,
                    EXPERTS,
                    EXPERTS_2,
                    SPLIT,
                ),
            ),
            (
                _copy_down,
                (logits, act_codes, weight, tokens, pipe, DIM, HIDDEN, EXPERTS, EXPERTS_2, SPLIT),
            ),
        ],
        [1],
        [40],
    )
