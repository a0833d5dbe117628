"""The FP8 MoE layer of any routing for few tokens, 2 to 64: the Triton kernels.

A layer is seven launches, one after the other, or six for up to 16 tokens:

    score     router logits; quantises the input
    choose    the experts of each token and their weights (in `choice`)
    arrange   which experts run, and for which assignments (in `choice`); for up to 16 tokens
              `choose_and_arrange` does both
    gate_up   gate and up of the chosen and the shared experts, SwiGLU
    encode    quantises what SwiGLU gave
    down      the down product
    combine   the weighted sum over the experts of a token

A row of what experts compute is an assignment: one of the `slots` experts of one token, of which
the first are routed and the last shared. A shared expert that is n times as wide as a routed one
is n experts that every token has with a weight of 1.

Weights are [experts + shared, out, in], the shared ones last. With BLOCK above 0 they have a scale
for each BLOCK x BLOCK values, and a token has a scale for each BLOCK inputs; otherwise a weight has
a scale for each output, and a token one.

Decoding is bound by the bytes of the experts that it reads. So a program computes some outputs of
one expert for all tokens that chose it, and the weights are the wide operand of the product.
"""

import triton
import triton.language as tl

from moec.kernels.triton.overlap import next_may_start, wait


@triton.jit
def encode_at(values, at, WIDTH: tl.constexpr, WIDTH_2: tl.constexpr, BLOCK: tl.constexpr):
    """The E4M3 values of a row and its scales: one number, or with BLOCK one for each BLOCK."""
    if BLOCK > 0:
        parts = tl.reshape(values, (WIDTH_2 // BLOCK, BLOCK))
        scale = tl.maximum(tl.max(tl.abs(parts), 1) / 448.0, 1e-12)
        codes = tl.reshape(parts / scale[:, None], (WIDTH_2,)).to(tl.float8e4nv)
        return codes, scale
    else:
        scale = tl.maximum(tl.max(tl.abs(values), 0) / 448.0, 1e-12)
        return (values / scale).to(tl.float8e4nv), scale


@triton.jit
def write_codes(
    values,
    codes,
    scale,
    row,
    WIDTH: tl.constexpr,
    WIDTH_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the row of values, float32 [WIDTH_2] with zeros from WIDTH on, as codes and scales."""
    at = tl.arange(0, WIDTH_2)
    found, scales = encode_at(values, at, WIDTH, WIDTH_2, BLOCK)
    tl.store(codes + row * WIDTH + at, found, mask=at < WIDTH)
    if BLOCK > 0:
        block = tl.arange(0, WIDTH_2 // BLOCK)
        tl.store(scale + row * (WIDTH // BLOCK) + block, scales, mask=block < WIDTH // BLOCK)
    else:
        tl.store(scale + row, scales)


@triton.jit(do_not_specialize=["tokens"])
def score(
    x,
    router,
    logits,
    codes,
    scale,
    present,
    largest,
    tokens,
    DIM: tl.constexpr,
    DIM_2: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    MAXIMA: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute the router logits of x, bf16 [tokens, dim], and quantise x.

    Grid (tokens / ROWS, experts / COLUMNS + ROWS, SPLIT): a program computes the logits of ROWS
    tokens and COLUMNS experts from one of SPLIT parts of the inputs; the last ROWS programs of the
    first part each quantise a token. It writes logits, float32 [SPLIT, tokens, experts]; codes and
    scale; and zeros to present [experts] and largest [MAXIMA].
    """
    first, column, part = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    many: tl.constexpr = (EXPERTS + COLUMNS - 1) // COLUMNS
    next_may_start(OVERLAP)
    if column < many:
        expert = column * COLUMNS + tl.arange(0, COLUMNS)
        known = expert < EXPERTS
        if ROWS == 1:
            at = tl.arange(0, DIM_2)
            inside = at < DIM
            weight = tl.load(
                router + expert[:, None] * DIM + at[None, :],
                mask=known[:, None] & inside[None, :],
                other=0.0,
            )
            wait(OVERLAP)
            row = tl.load(x + first * DIM + at, mask=inside, other=0.0).to(tl.float32)
            found = tl.sum(row[None, :] * weight.to(tl.float32), 1)
            tl.store(logits + first * EXPERTS + expert, found, mask=known)
        else:
            depth, at = part * (DIM // SPLIT) + tl.arange(0, DEPTH), first + tl.arange(0, ROWS)
            used = at < tokens
            wait(OVERLAP)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k in range(0, DIM // SPLIT, DEPTH):
                rows = tl.load(
                    x + at[:, None] * DIM + k + depth[None, :], mask=used[:, None], other=0.0
                )
                weight = tl.load(
                    router + expert[None, :] * DIM + k + depth[:, None],
                    mask=known[None, :],
                    other=0.0,
                )
                total = tl.dot(rows, weight, total)
            place = logits + (part * tokens + at)[:, None] * EXPERTS + expert[None, :]
            tl.store(place, total, mask=used[:, None] & known[None, :])
    elif part == 0:
        wait(OVERLAP)
        token = first + column - many
        if token < tokens:
            at = tl.arange(0, DIM_2)
            row = tl.load(x + token * DIM + at, mask=at < DIM, other=0.0).to(tl.float32)
            write_codes(row, codes, scale, token, DIM, DIM_2, BLOCK)
        if (first == 0) & (column == many):
            number = tl.arange(0, EXPERTS_2)
            tl.store(present + number, 0 * number, mask=number < EXPERTS)
            for begin in tl.static_range(0, MAXIMA, 1024):
                number = begin + tl.arange(0, 1024)
                tl.store(largest + number, 0 * number, mask=number < MAXIMA)
    else:
        wait(OVERLAP)


@triton.jit
def gate_up(
    plan,
    place,
    codes,
    scale,
    weight,
    weight_scale,
    act,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLOTS: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute SwiGLU(gate, up) of every assignment.

    Grid (hidden / ROWS, experts that there can be). weight [experts, 2 * hidden, dim] holds gate,
    then up. The kernel writes act, bf16 [tokens * SLOTS, hidden]. Of an expert with more than
    COLUMNS assignments it reads the weights again: of few tokens that is rare.
    """
    IN_ROW: tl.constexpr = DIM // BLOCK if BLOCK > 0 else 0
    out, depth = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    wait(OVERLAP)
    next_may_start(OVERLAP)  # not earlier: `down` reads the choices without a wait of its own
    slot, column = tl.program_id(1), tl.arange(0, COLUMNS)
    expert = tl.load(plan + 2 * slot, cache_modifier=".cg")  # not an older value from L1
    count = tl.load(plan + 2 * slot + 1, cache_modifier=".cg")
    gate_at = weight + expert.to(tl.int64) * (2 * HIDDEN * DIM)
    gate_at += out[:, None] * DIM + depth[None, :]
    up_at = gate_at + HIDDEN * DIM
    if BLOCK > 0:
        row = expert * (2 * HIDDEN // BLOCK) + tl.program_id(0) * ROWS // BLOCK
        gate_scales = weight_scale + row * IN_ROW
        up_scales = gate_scales + HIDDEN // BLOCK * IN_ROW
    else:
        scales = weight_scale + expert * (2 * HIDDEN) + out
        gate_scale, up_scale = tl.load(scales), tl.load(scales + HIDDEN)
    for first in range(0, count, COLUMNS):
        used = first + column < count
        at = place + slot * PLACES + first + column
        which = tl.load(at, mask=used, other=0, cache_modifier=".cg")
        token = which // SLOTS
        if BLOCK == 0:
            by_token = tl.load(scale + token, mask=used, other=0.0)
        x_at = codes + token[None, :] * DIM + depth[:, None]
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, DIM, DEPTH):
            w_gate = tl.load(gate_at + k, eviction_policy="evict_first")
            w_up = tl.load(up_at + k, eviction_policy="evict_first")
            x = tl.load(x_at + k, mask=used[None, :], other=0.0)
            if BLOCK > 0:
                block = k // BLOCK
                by_token = tl.load(scale + token * IN_ROW + block, mask=used, other=0.0)
                gate += tl.dot(w_gate, x) * (tl.load(gate_scales + block) * by_token)[None, :]
                up += tl.dot(w_up, x) * (tl.load(up_scales + block) * by_token)[None, :]
            else:
                gate = tl.dot(w_gate, x, gate, max_num_imprecise_acc=EXACT)
                up = tl.dot(w_up, x, up, max_num_imprecise_acc=EXACT)
        if BLOCK == 0:
            gate = gate * gate_scale[:, None] * by_token[None, :]
            up = up * up_scale[:, None] * by_token[None, :]
        done = (gate * tl.sigmoid(gate) * up).to(tl.bfloat16)
        tl.store(act + which[None, :] * HIDDEN + out[:, None], done, mask=used[None, :])


@triton.jit
def encode(
    act,
    act_codes,
    act_scale,
    HIDDEN: tl.constexpr,
    HIDDEN_2: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Quantise act. Grid (assignments)."""
    row, at = tl.program_id(0), tl.arange(0, HIDDEN_2)
    next_may_start(OVERLAP)
    wait(OVERLAP)
    values = tl.load(act + row * HIDDEN + at, mask=at < HIDDEN, other=0.0).to(tl.float32)
    write_codes(values, act_codes, act_scale, row, HIDDEN, HIDDEN_2, BLOCK)


@triton.jit
def down(
    plan,
    place,
    act_codes,
    act_scale,
    weight,
    weight_scale,
    parts,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLOTS: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The down product of every assignment, as `gate_up` does its own.

    Grid (dim / ROWS, experts that there can be). weight is [experts, dim, hidden]. The kernel
    writes parts, float32 [tokens * SLOTS, dim].
    """
    IN_ROW: tl.constexpr = HIDDEN // BLOCK if BLOCK > 0 else 0
    out, depth = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    next_may_start(OVERLAP)
    # choices are there: `gate_up` waited for them before it let `encode` start
    slot, column = tl.program_id(1), tl.arange(0, COLUMNS)
    expert = tl.load(plan + 2 * slot, cache_modifier=".cg")  # not an older value from L1
    count = tl.load(plan + 2 * slot + 1, cache_modifier=".cg")
    w_at = weight + expert.to(tl.int64) * (DIM * HIDDEN)
    w_at += out[:, None] * HIDDEN + depth[None, :]
    if BLOCK > 0:
        row = expert * (DIM // BLOCK) + tl.program_id(0) * ROWS // BLOCK
        scales = weight_scale + row * IN_ROW
    else:
        by_row = tl.load(weight_scale + expert * DIM + out)
    wait(OVERLAP)
    for first in range(0, count, COLUMNS):
        used = first + column < count
        at = place + slot * PLACES + first + column
        which = tl.load(at, mask=used, other=0, cache_modifier=".cg")
        if BLOCK == 0:
            by_token = tl.load(act_scale + which, mask=used, other=0.0)
        x_at = act_codes + which[None, :] * HIDDEN + depth[:, None]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, HIDDEN, DEPTH):
            w = tl.load(w_at + k, eviction_policy="evict_first")
            x = tl.load(x_at + k, mask=used[None, :], other=0.0)
            if BLOCK > 0:
                block = k // BLOCK
                by_token = tl.load(act_scale + which * IN_ROW + block, mask=used, other=0.0)
                total += tl.dot(w, x) * (tl.load(scales + block) * by_token)[None, :]
            else:
                total = tl.dot(w, x, total, max_num_imprecise_acc=EXACT)
        if BLOCK == 0:
            total = total * by_row[:, None] * by_token[None, :]
        tl.store(parts + which[None, :] * DIM + out[:, None], total, mask=used[None, :])


@triton.jit
def combine(
    parts,
    given,
    out,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Add up the parts of each token, times their weights, in order.

    Grid (tokens, dim / WIDTH). given is float32 [tokens, SLOTS]. It writes out, bf16 [tokens, dim].
    """
    token, at = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    next_may_start(OVERLAP)
    wait(OVERLAP)
    total = tl.zeros((WIDTH,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = token * SLOTS + slot
        total += tl.load(given + row) * tl.load(parts + row * DIM + at)
    tl.store(out + token * DIM + at, total.to(tl.bfloat16))
