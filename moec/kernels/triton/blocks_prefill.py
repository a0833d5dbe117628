"""The two products of the FP8 MoE layer for many tokens, of weights with a scale for each block.

A step takes the inputs of one block. Its sums are scaled and added in float32, because each block
has scales of its own.
"""

import triton
import triton.language as tl

from moec.kernels.triton.moe_prefill import tile_at


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
    """`gate_up` of `moe_prefill`; row_scale is [rows, dim / DEPTH].

    weight_scale is [experts, 2 * hidden / DEPTH, dim / DEPTH].
    """
    tiles = tl.load(plan)
    many = HIDDEN // COLUMNS
    for tile in range(tl.program_id(0), tiles * many, tl.num_programs(0)):
        across, along = tile_at(tile, tiles, many, GROUP)
        expert = tl.load(plan + 1 + 2 * across)
        first = expert * (2 * HIDDEN) + along * COLUMNS
        by_row = row_scale + (across * TILE + tl.arange(0, TILE)) * (DIM // DEPTH)
        by_block = weight_scale + first // DEPTH * (DIM // DEPTH)
        gate = tl.zeros((TILE, COLUMNS), tl.float32)
        up = tl.zeros((TILE, COLUMNS), tl.float32)
        for step in range(0, DIM // DEPTH):
            k = step * DEPTH
            x = rows.load([across * TILE, k])
            scale = tl.load(by_row + step)
            part = tl.dot(x, weight.load([first, k]).T)
            gate += part * (scale * tl.load(by_block + step))[:, None]
            part = tl.dot(x, weight.load([first + HIDDEN, k]).T)
            more = tl.load(by_block + HIDDEN // DEPTH * (DIM // DEPTH) + step)
            up += part * (scale * more)[:, None]
        done = (gate * tl.sigmoid(gate) * up).to(tl.bfloat16)
        act.store([across * TILE, along * COLUMNS], done)


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
    """`down` of `moe_prefill`, with tiles of COLUMNS outputs; act_scale is [rows, hidden / DEPTH].

    weight_scale is [experts, dim / DEPTH, hidden / DEPTH].
    """
    tiles = tl.load(plan)
    many = DIM // COLUMNS
    for tile in range(tl.program_id(0), tiles * many, tl.num_programs(0)):
        across, along = tile_at(tile, tiles, many, GROUP)
        expert = tl.load(plan + 1 + 2 * across)
        first = expert * DIM + along * COLUMNS
        by_row = act_scale + (across * TILE + tl.arange(0, TILE)) * (HIDDEN // DEPTH)
        by_block = weight_scale + first // DEPTH * (HIDDEN // DEPTH)
        total = tl.zeros((TILE, COLUMNS), tl.float32)
        for step in range(0, HIDDEN // DEPTH):
            x = act_codes.load([across * TILE, step * DEPTH])
            part = tl.dot(x, weight.load([first, step * DEPTH]).T)
            total += part * (tl.load(by_row + step) * tl.load(by_block + step))[:, None]
        parts.store([across * TILE, along * COLUMNS], total.to(parts.dtype))
