"""The FP8 MoE layer for few tokens, 1 to 64: Triton kernels that read each weight once.

    route     norm and router logits; the input's codes and scale, by token
    gate_up   both products of the chosen experts and of the shared one, SwiGLU, largest magnitudes
    encode    codes of what SwiGLU made
    down      the last product
    combine   the sum of routed and shared

A decode step is bound by the bytes of the experts that it touches, so everything serves one long
read of them. Weights are [E + 1, out, in], the shared expert last; a program has some outputs of
one expert for all tokens that chose it, and the weights are the wide operand of the product. No
token is sorted: with up to E tokens there is a slot for each, and a slot whose expert an earlier
one has is left out; with more there is a slot for each expert.

Llama 4's score scales the expert's input; rounding x * s by token gives the codes of x and a scale
that is s times as large, so that routed and shared experts use the same codes.

Sums run in a fixed order, maxima do not depend on one: results repeat to the bit. On sm_90 the
products for up to 16 tokens are those of `stream_hopper`.
"""

import triton
import triton.language as tl

from moec.kernels.triton.overlap import next_may_start, wait


@triton.jit(do_not_specialize=["tokens"])
def route(
    x,
    skip,
    gain,
    total,
    router,
    logits,
    codes,
    scale,
    largest,
    tokens,
    DIM: tl.constexpr,
    DIM_2: tl.constexpr,
    EXPERTS: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (tokens, experts + 1): a logit each; the last column rounds x, bf16 [tokens, dim].

    With NORM the layer's input is the RMS norm of total = x + skip, times gain. Writes logits
    [tokens, experts] in float32 (of the dtype that a linear layer gives), total, codes, scale
    [tokens], and zeros to largest [2 * tokens].
    """
    token, expert = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, DIM_2)
    inside, row_at = at < DIM, token * DIM + at
    next_may_start(OVERLAP)
    known = inside & (expert < EXPERTS)
    weight = tl.load(router + expert * DIM + at, mask=known, other=0.0).to(tl.float32)
    wait(OVERLAP)
    row = tl.load(x + row_at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        row += tl.load(skip + row_at, mask=inside, other=0.0).to(tl.float32)
        row = row.to(tl.bfloat16).to(tl.float32)
        if expert == EXPERTS:
            tl.store(total + row_at, row.to(tl.bfloat16), mask=inside)
        root = tl.rsqrt(tl.sum(row * row, 0) / DIM + EPS)
        factor = tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
        row = ((row * root).to(tl.bfloat16).to(tl.float32) * factor).to(tl.bfloat16).to(tl.float32)
    if expert < EXPERTS:
        logit = tl.sum(row * weight, 0).to(tl.bfloat16).to(tl.float32)
        tl.store(logits + token * EXPERTS + expert, logit)
    else:
        one = tl.maximum(tl.max(tl.abs(row), 0) / 448.0, 1e-12)
        tl.store(codes + row_at, (row / one).to(tl.float8e4nv), mask=inside)
        tl.store(scale + token, one)
        tl.store(largest + token, 0)
        tl.store(largest + tokens + token, 0)


@triton.jit
def _slot(
    logits,
    tokens,
    slot,
    slots,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    TOKENS_2: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):
    """The expert of a slot, how many tokens it serves, which of all, all scores; if it is shared.

    Ties go to the first expert, as in topk.
    """
    token, expert = tl.arange(0, TOKENS_2), tl.arange(0, EXPERTS_2)
    inside = (token[:, None] < tokens) & (expert[None, :] < EXPERTS)
    rows = tl.load(
        logits + token[:, None] * EXPERTS + expert[None, :],
        mask=inside,
        other=float("-inf"),
        cache_modifier=".cg",  # past the first level, which may hold what was there before
    )
    chosen = tl.where(token < tokens, tl.argmax(rows, 1), -1)
    score = tl.sigmoid(tl.max(rows, 1)).to(tl.bfloat16).to(tl.float32)
    shared = slot == slots - 1
    if BY_TOKEN:
        mine = tl.sum(tl.where(token == tl.minimum(slot, tokens - 1), chosen, 0), 0)
        first = tl.min(tl.where(chosen == mine, token, TOKENS_2), 0)
        live = shared | (first == slot)
    else:
        mine = slot
        live = True
    served = ((chosen == mine) | shared) & (token < tokens)
    count = tl.where(live, tl.sum(served.to(tl.int32), 0), 0)
    return tl.where(shared, EXPERTS, mine), count, served, score, shared


@triton.jit
def _columns(served, score, TOKENS_2: tl.constexpr, COLUMNS: tl.constexpr):
    """The tokens that a slot serves, and their scores, in the first of COLUMNS."""
    token, column = tl.arange(0, TOKENS_2), tl.arange(0, COLUMNS)
    rank = tl.cumsum(served.to(tl.int32), 0) - 1
    hit = (rank[:, None] == column[None, :]) & served[:, None]
    which = tl.sum(tl.where(hit, token[:, None], 0), 0)
    return which, tl.sum(tl.where(hit, score[:, None], 0.0), 0)


@triton.jit
def _gate_up(
    expert,
    count,
    served,
    score,
    shared,
    codes,
    scale,
    weight,
    weight_scale,
    act,
    largest,
    tokens,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS_2: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """`gate_up` for at most COLUMNS tokens."""
    which, gain = _columns(served, score, TOKENS_2, COLUMNS)
    used = tl.arange(0, COLUMNS) < count
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    gate_at = (
        weight + expert.to(tl.int64) * (2 * HIDDEN * DIM) + out[:, None] * DIM + depth[None, :]
    )
    up_at = gate_at + HIDDEN * DIM
    x_at = codes + which[None, :] * DIM + depth[:, None]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, DIM, DEPTH):
        w_gate = tl.load(gate_at + k, eviction_policy="evict_first")
        w_up = tl.load(up_at + k, eviction_policy="evict_first")
        x = tl.load(x_at + k, mask=used[None, :], other=0.0)
        gate = tl.dot(w_gate, x, gate, max_num_imprecise_acc=EXACT)
        up = tl.dot(w_up, x, up, max_num_imprecise_acc=EXACT)
    x_scale = tl.load(scale + which, mask=used, other=0.0) * tl.where(shared, 1.0, gain)
    scales = weight_scale + expert * (2 * HIDDEN) + out
    gate = gate * tl.load(scales)[:, None] * x_scale[None, :]
    up = up * tl.load(scales + HIDDEN)[:, None] * x_scale[None, :]
    done = (gate * tl.sigmoid(gate) * up).to(tl.bfloat16)
    row = which + tl.where(shared, tokens, 0)
    tl.store(act + row[None, :] * HIDDEN + out[:, None], done, mask=used[None, :])
    most = tl.max(tl.abs(done.to(tl.float32)), 0)  # bits of floats of one sign sort as they do
    tl.atomic_max(largest + row, most.to(tl.int32, bitcast=True), mask=used, sem="relaxed")


@triton.jit(do_not_specialize=["tokens"])
def gate_up(
    logits,
    codes,
    scale,
    weight,
    weight_scale,
    act,
    largest,
    tokens,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    TOKENS_2: tl.constexpr,
    FEW: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    OVERLAP: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid (hidden / ROWS, slots). weight [experts + 1, 2 * hidden, dim]: gate, then up.

    Writes act, bf16 [2 * tokens, hidden]: routed rows, then shared ones; and the largest magnitude
    of each row, as the bits of a float32, in largest [2 * tokens].
    """
    slot, slots = tl.program_id(1), tl.num_programs(1)
    wait(OVERLAP)
    next_may_start(OVERLAP)  # not before: who reads logits without waiting counts on that
    expert, count, served, score, shared = _slot(
        logits, tokens, slot, slots, EXPERTS, EXPERTS_2, TOKENS_2, BY_TOKEN
    )
    if count > FEW:
        _gate_up(
            expert,
            count,
            served,
            score,
            shared,
            codes,
            scale,
            weight,
            weight_scale,
            act,
            largest,
            tokens,
            DIM,
            HIDDEN,
            TOKENS_2,
            TOKENS_2,
            ROWS,
            DEPTH,
            EXACT,
        )
    if FEW > 0:  # most experts serve a few of many tokens
        if (count > 0) & (count <= FEW):
            _gate_up(
                expert,
                count,
                served,
                score,
                shared,
                codes,
                scale,
                weight,
                weight_scale,
                act,
                largest,
                tokens,
                DIM,
                HIDDEN,
                TOKENS_2,
                FEW,
                ROWS,
                DEPTH,
                EXACT,
            )


@triton.jit
def encode(
    act,
    largest,
    act_codes,
    HIDDEN: tl.constexpr,
    OVERLAP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid (2 * tokens, hidden / WIDTH): act in E4M3, each row over its largest magnitude."""
    row, at = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    next_may_start(OVERLAP)
    wait(OVERLAP)
    scale = tl.maximum(tl.load(largest + row).to(tl.float32, bitcast=True) / 448.0, 1e-12)
    values = tl.load(act + row * HIDDEN + at).to(tl.float32)
    tl.store(act_codes + row * HIDDEN + at, (values / scale).to(tl.float8e4nv))


@triton.jit
def _down(
    expert,
    count,
    served,
    score,
    shared,
    split,
    act_codes,
    largest,
    weight,
    weight_scale,
    parts,
    tokens,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS_2: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """`down` for at most COLUMNS tokens, its share of the inputs."""
    which, _ = _columns(served, score, TOKENS_2, COLUMNS)
    used = tl.arange(0, COLUMNS) < count
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = split * (HIDDEN // SPLIT) + tl.arange(0, DEPTH)
    row = which + tl.where(shared, tokens, 0)
    most = tl.load(largest + row, mask=used, other=0).to(tl.float32, bitcast=True)
    scale = tl.maximum(most / 448.0, 1e-12)
    weight_at = (
        weight + expert.to(tl.int64) * (DIM * HIDDEN) + column[:, None] * HIDDEN + depth[None, :]
    )
    act_at = act_codes + row[None, :] * HIDDEN + depth[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, HIDDEN // SPLIT, DEPTH):
        w = tl.load(weight_at + k, eviction_policy="evict_first")
        codes = tl.load(act_at + k, mask=used[None, :], other=0.0)
        total = tl.dot(w, codes, total, max_num_imprecise_acc=EXACT)
    total = total * tl.load(weight_scale + expert * DIM + column)[:, None] * scale[None, :]
    part = tl.where(shared, SPLIT, 0) + split
    at = parts + (part * tokens + which[None, :]) * DIM + column[:, None]
    tl.store(at, total, mask=used[None, :])


@triton.jit(do_not_specialize=["tokens"])
def down(
    logits,
    act_codes,
    largest,
    weight,
    weight_scale,
    parts,
    tokens,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    TOKENS_2: tl.constexpr,
    FEW: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    OVERLAP: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Grid (dim / ROWS, slots, SPLIT). weight [experts + 1, dim, hidden].

    Writes parts, float32 [2 * SPLIT, tokens, dim]: each token's of its expert, then of the shared
    one. Who comes next adds them up: waiting here for the last of them would cost more.
    """
    slot, split = tl.program_id(1), tl.program_id(2)
    slots = tl.num_programs(1)
    # This runs only once all of `gate_up` has waited for the logits, so they are there.
    expert, count, served, score, shared = _slot(
        logits, tokens, slot, slots, EXPERTS, EXPERTS_2, TOKENS_2, BY_TOKEN
    )
    next_may_start(OVERLAP)
    wait(OVERLAP)
    if count > FEW:
        _down(
            expert,
            count,
            served,
            score,
            shared,
            split,
            act_codes,
            largest,
            weight,
            weight_scale,
            parts,
            tokens,
            DIM,
            HIDDEN,
            TOKENS_2,
            TOKENS_2,
            ROWS,
            DEPTH,
            EXACT,
            SPLIT,
        )
    if FEW > 0:
        if (count > 0) & (count <= FEW):
            _down(
                expert,
                count,
                served,
                score,
                shared,
                split,
                act_codes,
                largest,
                weight,
                weight_scale,
                parts,
                tokens,
                DIM,
                HIDDEN,
                TOKENS_2,
                FEW,
                ROWS,
                DEPTH,
                EXACT,
                SPLIT,
            )


@triton.jit
def combine(
    parts,
    out,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (tokens, dim / WIDTH). The sum of float32 parts [PARTS, tokens, dim], in order."""
    token, tokens = tl.program_id(0), tl.num_programs(0)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    next_may_start(OVERLAP)
    wait(OVERLAP)
    total = tl.zeros((WIDTH,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (part * tokens + token) * DIM + at)
    tl.store(out + token * DIM + at, total.to(tl.bfloat16))
