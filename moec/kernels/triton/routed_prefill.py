"""The FP8 MoE layer of any routing for many tokens, in Triton: what is around its two products.

A layer is eleven launches, one after the other:

    score     router logits; quantises the input (in `routed_decode`)
    choose    the experts of each token and their weights (in `choice`)
    count     how many tokens of each block have chosen an expert
    before    how many tokens of earlier blocks have
    plan      the expert of each tile of rows
    arrange   the row of each assignment, sorted by expert
    spread    copies quantised values to those rows
    gate_up   gate and up of each tile, SwiGLU
    encode    quantises what SwiGLU gave
    down      the down product
    combine   the weighted sum of a token's rows

The products are those of `moe_prefill` or `moec.kernels.hopper.moe_prefill`, and for weights with
blocks those of `blocks_prefill`. The rows of the shared experts come first, one for each token. The
rows of an expert fill whole tiles and keep the order of their tokens, so results repeat to the bit.
"""

import triton
import triton.language as tl

from moec.kernels.triton.routed_decode import write_codes


@triton.jit(do_not_specialize=["tokens"])
def count(
    chosen,
    counts,
    tokens,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the tokens of a block that have chosen each expert: counts, i32 [blocks, experts].

    Grid (tokens / BLOCK).
    """
    token, expert = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EXPERTS_2)
    found = tl.zeros((EXPERTS_2,), tl.int32)
    for number in tl.static_range(TOP_K):
        at = token * (TOP_K + SHARED) + number
        choice = tl.load(chosen + at, mask=token < tokens, other=-1)
        found += tl.sum((choice[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * EXPERTS + expert, found, mask=expert < EXPERTS)


@triton.jit(do_not_specialize=["blocks"])
def before(
    counts,
    earlier,
    totals,
    blocks,
    EXPERTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Add up the counts of earlier blocks, i32 [blocks, experts], and of all, i32 [experts].

    Grid (experts / 16). It writes earlier and totals.
    """
    expert, step = tl.program_id(0) * 16 + tl.arange(0, 16), tl.arange(0, STEP)
    total = tl.zeros((16,), tl.int32)
    for first in range(0, blocks, STEP):
        block = first + step
        at = block[:, None] * EXPERTS + expert[None, :]
        inside = (block < blocks)[:, None] & (expert < EXPERTS)[None, :]
        found = tl.load(counts + at, mask=inside, other=0)
        tl.store(earlier + at, total[None, :] + tl.cumsum(found, 0) - found, mask=inside)
        total += tl.sum(found, 0)
    tl.store(totals + expert, total, mask=expert < EXPERTS)


@triton.jit
def _ends(totals, tokens, expert, EXPERTS: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr):
    """How many rows each expert has, its tiles, and the tile after its last one."""
    rows = tl.load(totals + expert, mask=expert < EXPERTS, other=0)
    tiles = (rows + TILE - 1) // TILE
    common = SHARED * ((tokens + TILE - 1) // TILE)
    return rows, tiles, common + tl.cumsum(tiles, 0)


@triton.jit(do_not_specialize=["tokens"])
def plan(
    totals,
    plan,
    tokens,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the number of tiles, then each tile's expert and how many of its rows are in use.

    Grid (the most tiles that there can be). plan is i32 [1 + 2 * tiles].
    """
    tile, expert = tl.program_id(0), tl.arange(0, EXPERTS_2)
    rows, tiles, ends = _ends(totals, tokens, expert, EXPERTS, SHARED, TILE)
    each = (tokens + TILE - 1) // TILE
    common = SHARED * each
    last = common + tl.sum(tiles, 0)
    mine = (tile >= ends - tiles) & (tile < ends)
    routed = tl.sum(tl.where(mine, expert, 0), 0)
    left = tl.sum(tl.where(mine, rows - (tile - ends + tiles) * TILE, 0), 0)
    if tile < common:
        routed = EXPERTS + tile // each
        left = tokens - tile % each * TILE
    if tile < last:
        tl.store(plan + 1 + 2 * tile, routed)
        tl.store(plan + 2 + 2 * tile, tl.minimum(left, TILE))
    if tile == 0:
        tl.store(plan, last)


@triton.jit(do_not_specialize=["tokens"])
def arrange(
    chosen,
    earlier,
    totals,
    place,
    tokens,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the row of each assignment among those of its expert: place, i32 [tokens, slots].

    Grid (tokens / BLOCK).
    """
    SLOTS: tl.constexpr = TOP_K + SHARED
    block = tl.program_id(0)
    token, expert = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EXPERTS_2)
    inside = token < tokens
    _, tiles, ends = _ends(totals, tokens, expert, EXPERTS, SHARED, TILE)
    before = tl.load(earlier + block * EXPERTS + expert, mask=expert < EXPERTS, other=0)
    mine = tl.zeros((BLOCK, EXPERTS_2), tl.int32)
    for number in tl.static_range(TOP_K):
        choice = tl.load(chosen + token * SLOTS + number, mask=inside, other=-1)
        mine += (choice[:, None] == expert[None, :]).to(tl.int32)
    row = ((ends - tiles) * TILE + before)[None, :] + tl.cumsum(mine, 0) - 1
    for number in tl.static_range(TOP_K):
        at = token * SLOTS + number
        choice = tl.load(chosen + at, mask=inside, other=-1)
        own = tl.where(choice[:, None] == expert[None, :], row, 0)
        tl.store(place + at, tl.sum(own, 1), mask=inside)
    for part in tl.static_range(SHARED):
        first = part * ((tokens + TILE - 1) // TILE) * TILE
        tl.store(place + token * SLOTS + TOP_K + part, first + token, mask=inside)


@triton.jit
def spread(
    codes,
    scale,
    place,
    rows,
    row_scale,
    DIM: tl.constexpr,
    DIM_2: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_2: tl.constexpr,
):
    """Copy the quantised values and the SCALES scales of a token to the rows of its experts.

    Grid (tokens, slots).
    """
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(place + token * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    at, number = tl.arange(0, DIM_2), tl.arange(0, SCALES_2)
    found = tl.load(codes + token * DIM + at, mask=at < DIM)
    scales = tl.load(scale + token * SCALES + number, mask=number < SCALES)
    tl.store(rows + row * DIM + at, found, mask=at < DIM)
    tl.store(row_scale + row * SCALES + number, scales, mask=number < SCALES)


@triton.jit
def encode(
    act,
    plan,
    act_codes,
    act_scale,
    HIDDEN: tl.constexpr,
    HIDDEN_2: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantise the rows of act that are in use. Grid (the most rows that there can be)."""
    row, at = tl.program_id(0), tl.arange(0, HIDDEN_2)
    if row < tl.load(plan) * TILE:
        if row % TILE < tl.load(plan + 2 + 2 * (row // TILE)):
            place = act + row.to(tl.int64) * HIDDEN + at
            values = tl.load(place, mask=at < HIDDEN, other=0.0).to(tl.float32)
            wide = row.to(tl.int64)
            write_codes(values, act_codes, act_scale, wide, HIDDEN, HIDDEN_2, BLOCK)


@triton.jit
def combine(
    parts,
    place,
    weight,
    out,
    DIM: tl.constexpr,
    DIM_2: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Add a token's rows, times their weights: out bf16 [tokens, dim]. Grid (tokens)."""
    token, at = tl.program_id(0), tl.arange(0, DIM_2)
    inside = at < DIM
    total = tl.zeros((DIM_2,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(place + token * SLOTS + slot).to(tl.int64)
        part = tl.load(parts + row * DIM + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weight + token * SLOTS + slot) * part
    tl.store(out + token.to(tl.int64) * DIM + at, total.to(tl.bfloat16), mask=inside)
