"""The two products of the FP8 MoE layer for few tokens: Triton kernels that read each weight once.

A decode step is bound by the bytes of the experts that it reads. So a program computes some outputs
of one expert for all tokens that chose it, and the weights are the wide operand of the product.
Weights are [experts + 1, out, in], the shared expert last.

The second axis of the grid counts slots; the last one is the shared expert's. Tokens are not
sorted. With up to as many tokens as experts there is a slot for each token, and a slot whose expert
an earlier slot has is left out. With more tokens there is a slot for each expert.
"""

import triton
import triton.language as tl

from moec.kernels.triton.overlap import next_may_start, wait


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
    """The expert of a slot; how many tokens it serves, and which; all scores; whether it is shared.

    Ties go to the first expert, as in topk.
    """
    token, expert = tl.arange(0, TOKENS_2), tl.arange(0, EXPERTS_2)
    inside = (token[:, None] < tokens) & (expert[None, :] < EXPERTS)
    rows = tl.load(
        logits + token[:, None] * EXPERTS + expert[None, :],
        mask=inside,
        other=float("-inf"),
        cache_modifier=".cg",  # not from L1, which may hold older values
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
    """The tokens that a slot serves and their scores, moved to the first of COLUMNS."""
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
    """`gate_up` of one expert for at most COLUMNS tokens."""
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
    """Compute SwiGLU(gate, up) of the routed and the shared expert of every token.

    Grid (hidden / ROWS, slots). weight [experts + 1, 2 * hidden, dim] holds gate, then up. The
    kernel writes act, bf16 [2 * tokens, hidden]: the routed rows, then the shared ones; and the
    largest magnitude of each row to largest [2 * tokens], as the bits of a float32.
    """
    slot, slots = tl.program_id(1), tl.num_programs(1)
    wait(OVERLAP)
    next_may_start(OVERLAP)  # not earlier: `down` reads the logits without a wait of its own
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
    if FEW > 0:  # of many tokens most experts serve a few: a narrower tile does for those
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
    """`down` of one expert and one split of the inputs, for at most COLUMNS tokens."""
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
    """Compute the partial sums of the down product (split-k), for the next launch to add up.

    Grid (dim / ROWS, slots, SPLIT). weight [experts + 1, dim, hidden]. It writes parts, float32
    [2 * SPLIT, tokens, dim]: for each token SPLIT partial sums of its own expert, then SPLIT of the
    shared one. Adding them here would cost more, as the adding program would wait for the others.
    """
    slot, split = tl.program_id(1), tl.program_id(2)
    slots = tl.num_programs(1)
    # This starts only after every program of `gate_up` has waited for the logits: they are there.
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
