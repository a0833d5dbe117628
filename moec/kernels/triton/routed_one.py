"""The FP8 MoE layer of any routing for one token: its two products, without a tensor core.

    gate_up   gate and up of the chosen and the shared experts, SwiGLU
    down      quantises what SwiGLU gave; the down product of all experts, and their sum

One token's layer is so short that each launch counts: what `routed_decode` does in five launches is
done in two. With CHOSEN the launch `choose` goes before them; without, every program chooses by
itself: that takes longer than a launch where choosing is much work.
"""

import triton
import triton.language as tl

from moec.kernels.triton.choice import choose_rows
from moec.kernels.triton.overlap import next_may_start, wait


@triton.jit
def _spread(scales, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Each of BLOCKS scales, BLOCK times."""
    return tl.reshape(tl.broadcast_to(scales[:, None], (BLOCKS, BLOCK)), (BLOCKS * BLOCK,))


@triton.jit
def gate_up(
    chosen,
    logits,
    bias,
    codes,
    scale,
    weight,
    weight_scale,
    act,
    largest,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_2: tl.constexpr,
    EACH_2: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    CHOICE: tl.constexpr,
    BIAS: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALISE: tl.constexpr,
    FACTOR: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute SwiGLU(gate, up) of each expert of the token: act, bf16 [slots, hidden].

    Grid (hidden / ROWS, slots). weight [experts, 2 * hidden, dim] holds gate, then up. The largest
    magnitudes, of each row or each BLOCK of one, go to largest as the bits of a float32.
    """
    slot = tl.program_id(1)
    wait(OVERLAP)
    next_may_start(OVERLAP)  # not earlier: `down` reads the logits without a wait of its own
    if CHOSEN:
        expert = tl.load(chosen + slot)
    else:
        expert = EXPERTS + slot - TOP_K
        if slot < TOP_K:
            place, number, _ = choose_rows(
                logits,
                bias,
                tl.arange(0, 1),
                1,
                EXPERTS,
                GROUPS,
                GROUPS_2,
                EACH_2,
                TOP_K,
                SCORE,
                CHOICE,
                BIAS,
                KEPT,
                NORMALISE,
                FACTOR,
                1,
            )
            expert = tl.sum(tl.where(place == slot, number[None, :], 0))
    out, depth = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    base = weight + expert.to(tl.int64) * (2 * HIDDEN * DIM)
    gate_at = base + out[:, None] * DIM + depth[None, :]
    gate = tl.zeros((ROWS,), tl.float32)
    up = tl.zeros((ROWS,), tl.float32)
    for k in tl.static_range(0, DIM, DEPTH):
        w_gate = tl.load(gate_at + k, eviction_policy="evict_first")
        w_up = tl.load(gate_at + HIDDEN * DIM + k, eviction_policy="evict_first")
        x = tl.load(codes + k + depth).to(tl.float32)
        if BLOCK > 0:
            block = k // BLOCK + tl.arange(0, DEPTH // BLOCK)
            row = expert * (2 * HIDDEN // BLOCK) + tl.program_id(0) * ROWS // BLOCK
            at = weight_scale + row * (DIM // BLOCK) + block
            by_token = tl.load(scale + block)
            x_gate = x * _spread(by_token * tl.load(at), DEPTH // BLOCK, BLOCK)
            more = tl.load(at + HIDDEN // BLOCK * (DIM // BLOCK))
            x_up = x * _spread(by_token * more, DEPTH // BLOCK, BLOCK)
        else:
            x_gate, x_up = x, x
        gate += tl.sum(w_gate.to(tl.float32) * x_gate[None, :], 1)
        up += tl.sum(w_up.to(tl.float32) * x_up[None, :], 1)
    if BLOCK == 0:
        by_token = tl.load(scale)
        scales = weight_scale + expert * (2 * HIDDEN) + out
        gate = gate * tl.load(scales) * by_token
        up = up * tl.load(scales + HIDDEN) * by_token
    done = (gate * tl.sigmoid(gate) * up).to(tl.bfloat16)
    tl.store(act + slot * HIDDEN + out, done)
    most = tl.max(tl.abs(done.to(tl.float32)), 0)  # bits of floats of one sign sort as they do
    at = largest + slot
    if BLOCK > 0:
        at = largest + slot * (HIDDEN // BLOCK) + tl.program_id(0) * ROWS // BLOCK
    tl.atomic_max(at, most.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def down(
    chosen,
    given,
    logits,
    bias,
    act,
    largest,
    weight,
    weight_scale,
    out,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_2: tl.constexpr,
    EACH_2: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    CHOICE: tl.constexpr,
    BIAS: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALISE: tl.constexpr,
    FACTOR: tl.constexpr,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    HIDDEN_2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The weighted sum of the down products of the token's experts: out, bf16 [dim].

    Grid (dim / ROWS). weight is [experts, dim, hidden]. The weights of the first EARLY experts are
    on their way before the wait for `gate_up`.
    """
    at = tl.arange(0, HIDDEN_2)
    rows, inside = tl.program_id(0) * ROWS + tl.arange(0, ROWS), at < HIDDEN
    next_may_start(OVERLAP)
    if not CHOSEN:
        place, number, weights = choose_rows(
            logits,
            bias,
            tl.arange(0, 1),
            1,
            EXPERTS,
            GROUPS,
            GROUPS_2,
            EACH_2,
            TOP_K,
            SCORE,
            CHOICE,
            BIAS,
            KEPT,
            NORMALISE,
            FACTOR,
            1,
        )
    ready = ()
    for slot in tl.static_range(EARLY):
        if CHOSEN:
            expert = tl.load(chosen + slot, cache_modifier=".cg")  # not an older value from L1
        elif slot < TOP_K:
            expert = tl.sum(tl.where(place == slot, number[None, :], 0))
        else:
            expert = EXPERTS + slot - TOP_K
        ready = ready + (_tile(weight, expert, rows, at, inside, DIM, HIDDEN),)
    wait(OVERLAP)
    total = tl.zeros((ROWS,), tl.float32)
    for slot in tl.static_range(TOP_K + SHARED):
        if CHOSEN:
            expert = tl.load(chosen + slot, cache_modifier=".cg")
            gain = tl.load(given + slot, cache_modifier=".cg")
        elif slot < TOP_K:
            expert = tl.sum(tl.where(place == slot, number[None, :], 0))
            gain = tl.sum(tl.where(place == slot, weights, 0.0))
        else:
            expert = EXPERTS + slot - TOP_K
            gain = 1.0
        if slot < EARLY:  # noqa: SIM108
            w = ready[slot]
        else:
            w = _tile(weight, expert, rows, at, inside, DIM, HIDDEN)
        row = tl.load(act + slot * HIDDEN + at, mask=inside, other=0.0).to(tl.float32)
        if BLOCK > 0:
            block = tl.arange(0, HIDDEN_2 // BLOCK)
            known = block < HIDDEN // BLOCK
            most = tl.load(largest + slot * (HIDDEN // BLOCK) + block, mask=known, other=0)
            scale = tl.maximum(most.to(tl.float32, bitcast=True) / 448.0, 1e-12)
            start = expert * (DIM // BLOCK) + tl.program_id(0) * ROWS // BLOCK
            by_block = weight_scale + start * (HIDDEN // BLOCK) + block
            by_block = tl.load(by_block, mask=known, other=0.0) * scale * gain
            codes = (row / _spread(scale, HIDDEN_2 // BLOCK, BLOCK)).to(tl.float8e4nv)
            x = codes.to(tl.float32) * _spread(by_block, HIDDEN_2 // BLOCK, BLOCK)
            total += tl.sum(w.to(tl.float32) * x[None, :], 1)
        else:
            most = tl.load(largest + slot)
            scale = tl.maximum(most.to(tl.float32, bitcast=True) / 448.0, 1e-12)
            x = (row / scale).to(tl.float8e4nv).to(tl.float32)
            by_row = tl.load(weight_scale + expert * DIM + rows) * (scale * gain)
            total += by_row * tl.sum(w.to(tl.float32) * x[None, :], 1)
    tl.store(out + rows, total.to(tl.bfloat16))


@triton.jit
def _tile(weight, expert, rows, at, inside, DIM: tl.constexpr, HIDDEN: tl.constexpr):
    """The weights of some outputs of an expert, all inputs."""
    place = weight + tl.cast(expert, tl.int64) * (DIM * HIDDEN)
    place += rows[:, None] * HIDDEN + at[None, :]
    return tl.load(place, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
