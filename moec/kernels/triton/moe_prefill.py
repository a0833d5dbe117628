"""The FP8 MoE layer for many tokens, in Triton: two products of large tiles, and what they need.

A layer is six launches, one after the other:

    route     router logits, each token's expert and score; quantises the input, by token
    arrange   copies quantised rows, sorted by expert; finds the expert of each tile of rows
    gate_up   gate and up of each tile, SwiGLU
    encode    quantises what SwiGLU gave, with a scale per row
    down      the down product
    combine   the sum of a token's routed and shared row

The shared expert has the first rows, one for each token. The rows of each routed expert follow. The
rows of an expert fill whole tiles, and `combine` does not read the padding. Only the device knows
how many tiles there are. `plan` holds that number, and then two numbers for each tile: its expert,
and how many of its rows are in use.

The rows of an expert keep the order of their tokens, and every sum has a fixed order. So results
repeat to the bit.
"""

import triton
import triton.language as tl

from moec.kernels.triton.norm import encode_row


@triton.jit(do_not_specialize=["tokens"])
def route(
    x,
    router,
    chosen,
    gain,
    rows,
    row_scale,
    tokens,
    DIM: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Choose the expert of each token of x, bf16 [tokens, dim]; ties go to the first, as in topk.

    Grid (tokens / BLOCK). It writes the expert to chosen [tokens], its score to gain [tokens], and
    the quantised values and scales of x to the first rows.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert, depth = tl.arange(0, EXPERTS_2), tl.arange(0, DEPTH)
    inside = token < tokens
    x_at = x + token.to(tl.int64)[:, None] * DIM + depth[None, :]
    router_at = router + expert[None, :] * DIM + depth[:, None]
    logits = tl.zeros((BLOCK, EXPERTS_2), tl.float32)
    most = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, DIM, DEPTH):
        part = tl.load(x_at + k, mask=inside[:, None], other=0.0)
        weight = tl.load(router_at + k, mask=(expert < EXPERTS)[None, :], other=0.0)
        logits = tl.dot(part, weight, logits)
        most = tl.maximum(most, tl.max(tl.abs(part.to(tl.float32)), 1))
    logits = logits.to(tl.bfloat16).to(tl.float32)
    logits = tl.where((expert < EXPERTS)[None, :], logits, float("-inf"))
    tl.store(chosen + token, tl.argmax(logits, 1).to(tl.int32), mask=inside)
    score = tl.sigmoid(tl.max(logits, 1)).to(tl.bfloat16).to(tl.float32)
    tl.store(gain + token, score, mask=inside)
    scale = tl.maximum(most / 448.0, 1e-12)
    tl.store(row_scale + token, scale, mask=inside)
    at = token.to(tl.int64)[:, None] * DIM + tl.arange(0, WIDTH)[None, :]
    for k in range(0, DIM, WIDTH):
        part = tl.load(x + at + k, mask=inside[:, None], other=0.0).to(tl.float32)
        codes = (part / scale[:, None]).to(tl.float8e4nv)
        tl.store(rows + at + k, codes, mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens"])
def arrange(
    chosen,
    gain,
    rows,
    row_scale,
    place,
    plan,
    tokens,
    DIM: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
    TILE: tl.constexpr,
    TILES_2: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copy the quantised values of every token to a row among those of its expert.

    Grid (tokens / BLOCK). Every program counts the choices of all tokens, then copies its own
    tokens: the values to rows, the scale times the score to row_scale, and the number of the row to
    place [tokens]. The first program also writes plan [1 + 2 * tiles].
    """
    block, expert = tl.program_id(0), tl.arange(0, EXPERTS_2)
    first = block * BLOCK
    counts = tl.zeros((EXPERTS_2,), tl.int32)
    before = tl.zeros((EXPERTS_2,), tl.int32)
    for start in range(0, tokens, SCAN):
        token = start + tl.arange(0, SCAN)
        choice = tl.load(chosen + token, mask=token < tokens, other=EXPERTS_2)
        hit = choice[:, None] == expert[None, :]
        counts += tl.sum(hit.to(tl.int32), 0)
        before += tl.sum((hit & (token < first)[:, None]).to(tl.int32), 0)
    tiles = (counts + TILE - 1) // TILE
    shared = (tokens + TILE - 1) // TILE
    ends = shared + tl.cumsum(tiles, 0)
    starts = (ends - tiles) * TILE + before
    token = first + tl.arange(0, BLOCK)
    inside = token < tokens
    choice = tl.load(chosen + token, mask=inside, other=EXPERTS_2)
    hit = (choice[:, None] == expert[None, :]).to(tl.int32)
    row = tl.sum(hit * (starts[None, :] + tl.cumsum(hit, 0) - 1), 1)
    tl.store(place + token, row, mask=inside)
    scale = tl.load(row_scale + token, mask=inside) * tl.load(gain + token, mask=inside)
    tl.store(row_scale + row, scale, mask=inside)
    at = tl.arange(0, WIDTH)
    source = rows + token.to(tl.int64)[:, None] * DIM + at[None, :]
    target = rows + row.to(tl.int64)[:, None] * DIM + at[None, :]
    for k in range(0, DIM, WIDTH):
        codes = tl.load(source + k, mask=inside[:, None], other=0.0)
        tl.store(target + k, codes, mask=inside[:, None])
    if block == 0:
        tile = tl.arange(0, TILES_2)
        begins = ends - tiles
        mine = (tile[:, None] >= begins[None, :]) & (tile[:, None] < ends[None, :])
        of = tl.sum(tl.where(mine, expert[None, :], 0), 1)
        left = counts[None, :] - (tile[:, None] - begins[None, :]) * TILE
        used = tl.minimum(tl.sum(tl.where(mine, left, 0), 1), TILE)
        common = tile < shared
        total = shared + tl.sum(tiles, 0)
        entry = plan + 1 + 2 * tile
        tl.store(plan, total)
        tl.store(entry, tl.where(common, EXPERTS, of), mask=tile < total)
        rest = tl.minimum(tokens - tile * TILE, TILE)
        tl.store(entry + 1, tl.where(common, rest, used), mask=tile < total)


@triton.jit
def tile_at(tile, tiles, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of an output tile. GROUP tiles of a column follow each other, to share L2."""
    group = tile // (GROUP * COLUMNS)
    height = tl.minimum(tiles - group * GROUP, GROUP)
    inner = tile % (GROUP * COLUMNS)
    return group * GROUP + inner % height, inner // height


@triton.jit
def gate_up(
    rows,
    row_scale,
    plan,
    weight,
    weight_scale,
    act,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Multiply by gate and up, then apply SwiGLU. A tile has TILE rows and COLUMNS of its outputs.

    Any grid of one axis. Descriptors: rows, weight [(experts + 1) * 2 * hidden, dim], act.
    """
    tiles = tl.load(plan)
    many = HIDDEN // COLUMNS
    for tile in range(tl.program_id(0), tiles * many, tl.num_programs(0)):
        across, along = tile_at(tile, tiles, many, GROUP)
        expert = tl.load(plan + 1 + 2 * across)
        first = expert * (2 * HIDDEN) + along * COLUMNS
        gate = tl.zeros((TILE, COLUMNS), tl.float32)
        up = tl.zeros((TILE, COLUMNS), tl.float32)
        for k in range(0, DIM, DEPTH):
            x = rows.load([across * TILE, k])
            w_gate = weight.load([first, k])
            w_up = weight.load([first + HIDDEN, k])
            gate = tl.dot(x, w_gate.T, gate)
            up = tl.dot(x, w_up.T, up)
        row = across * TILE + tl.arange(0, TILE)
        scales = weight_scale + first + tl.arange(0, COLUMNS)
        x_scale = tl.load(row_scale + row)[:, None]
        gate = gate * (x_scale * tl.load(scales)[None, :])
        up = up * (x_scale * tl.load(scales + HIDDEN)[None, :])
        done = (gate * tl.sigmoid(gate) * up).to(tl.bfloat16)
        act.store([across * TILE, along * COLUMNS], done)


@triton.jit
def encode(
    act,
    plan,
    act_codes,
    act_scale,
    HIDDEN: tl.constexpr,
    HIDDEN_2: tl.constexpr,
    TILE: tl.constexpr,
):
    """Quantise act to E4M3, with a scale per row. Grid (the most rows that there can be)."""
    row, at = tl.program_id(0), tl.arange(0, HIDDEN_2)
    if row < tl.load(plan) * TILE:
        inside = at < HIDDEN
        base = row.to(tl.int64) * HIDDEN
        values = tl.load(act + base + at, mask=inside, other=0.0).to(tl.float32)
        encode_row(values, at, inside, act_codes, act_scale, row, HIDDEN)


@triton.jit
def down(
    act_codes,
    act_scale,
    plan,
    weight,
    weight_scale,
    parts,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The down product: tiles of TILE rows by twice COLUMNS outputs, in two halves.

    Any grid of one axis. Descriptors: act_codes, weight [(experts + 1) * dim, hidden], parts.
    """
    tiles = tl.load(plan)
    many = DIM // (2 * COLUMNS)
    for tile in range(tl.program_id(0), tiles * many, tl.num_programs(0)):
        across, along = tile_at(tile, tiles, many, GROUP)
        expert = tl.load(plan + 1 + 2 * across)
        column = along * (2 * COLUMNS)
        first = expert * DIM + column
        left = tl.zeros((TILE, COLUMNS), tl.float32)
        right = tl.zeros((TILE, COLUMNS), tl.float32)
        for k in range(0, HIDDEN, DEPTH):
            x = act_codes.load([across * TILE, k])
            w_left = weight.load([first, k])
            w_right = weight.load([first + COLUMNS, k])
            left = tl.dot(x, w_left.T, left)
            right = tl.dot(x, w_right.T, right)
        row = across * TILE + tl.arange(0, TILE)
        scales = weight_scale + first + tl.arange(0, COLUMNS)
        x_scale = tl.load(act_scale + row)[:, None]
        left = left * (x_scale * tl.load(scales)[None, :])
        right = right * (x_scale * tl.load(scales + COLUMNS)[None, :])
        parts.store([across * TILE, column], left.to(parts.dtype))
        parts.store([across * TILE, column + COLUMNS], right.to(parts.dtype))


@triton.jit
def combine(parts, place, out, DIM: tl.constexpr, DIM_2: tl.constexpr):
    """Add a token's two rows: out bf16 [tokens, dim]. Grid (tokens)."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, DIM_2)
    inside = at < DIM
    routed = tl.load(parts + tl.load(place + token).to(tl.int64) * DIM + at, mask=inside)
    shared = tl.load(parts + token * DIM + at, mask=inside)
    total = routed.to(tl.float32) + shared.to(tl.float32)
    tl.store(out + token * DIM + at, total.to(tl.bfloat16), mask=inside)
