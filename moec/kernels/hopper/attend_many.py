"""Causal attention of many tokens on sm_90, in Gluon: one warp copies, two groups of four multiply.

The copying warp asks the TMA unit (the GPU's copy engine) for tiles of keys and of values, up to
STAGES of each ahead, and across the borders of blocks of tokens. Each group attends from 64 tokens.
While the tensor core adds up one tile's values, the group already has the next tile's scores, and
turns them into weights.

The programs of a sequence share its blocks: one of 128 tokens for each head. Blocks that see most
come first. Every other round of the programs is in reverse order, so that none gets more than the
others each time.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


class Tiles(NamedTuple):
    """What is in shared memory: tiles, and barriers that say that one has arrived, or is free.

    Two blocks have queries there. A result leaves through the place of its queries.
    """

    q: gl.shared_memory_descriptor  # of two blocks and two groups [4, 64, SIZE]
    k: gl.shared_memory_descriptor  # [STAGES, KEYS, SIZE]
    v: gl.shared_memory_descriptor  # [STAGES, KEYS, SIZE]
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor  # of each group


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which waits for so many ARRIVALS."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def _block_of(turn):
    """The number of the block that a program has in this round."""
    programs, program = gl.num_programs(0), gl.program_id(0)
    return turn * programs + program + (turn & 1) * (programs - 1 - 2 * program)


@gluon.jit
def _rounds(steps, HEADS: gl.constexpr, ROWS: gl.constexpr):
    """How many blocks a program has."""
    blocks = (steps + ROWS - 1) // ROWS * HEADS
    whole = blocks // gl.num_programs(0)
    return whole + (_block_of(whole) < blocks).to(gl.int32)


@gluon.jit
def _place(number, newest, steps, HEADS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """A block's head, its first token and the slot of that; how many tiles it attends to."""
    token = ((steps + ROWS - 1) // ROWS - 1 - number // HEADS) * ROWS
    first = newest - steps + 1 + token
    end = gl.maximum(gl.minimum(first + ROWS, newest + 1), 0)
    return number % HEADS, token, first, (end + KEYS - 1) // KEYS


@gluon.jit
def _copy_tile(source, row, step, targets, full, empty):
    """Ask for a tile of keys or values, once its place is empty."""
    STAGES: gl.constexpr = targets.shape[0]
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), 2 * targets.shape[1] * targets.shape[2])
    tma.async_copy_global_to_shared(source, [row, 0], full.index(slot), targets.index(slot))


@gluon.jit
def _copy(q, key, value, last, steps, slots, tiles, HEADS: gl.constexpr, GROUP: gl.constexpr):
    """The copying warp."""
    ROWS: gl.constexpr = 2 * tiles.q.shape[1]
    SIZE: gl.constexpr = tiles.q.shape[2]
    KEYS: gl.constexpr = tiles.k.shape[1]
    row = gl.program_id(2)
    newest = gl.load(last + row)
    step = 0
    for i in range(_rounds(steps, HEADS, ROWS)):
        head, token, _, many = _place(_block_of(i), newest, steps, HEADS, ROWS, KEYS)
        ready = tiles.q_full.index(i % 2)
        mbarrier.wait(tiles.q_empty.index(i % 2), (i // 2 & 1) ^ 1)
        mbarrier.expect(ready, 2 * ROWS * SIZE)
        for part in gl.static_range(2):
            at = row * steps + token + part * (ROWS // 2)
            to = tiles.q.index(i % 2 * 2 + part)
            tma.async_copy_global_to_shared(q, [at, head * SIZE], ready, to)
        start = (row * (HEADS // GROUP) + head // GROUP) * slots
        for tile in range(many):
            at = start + tile * KEYS
            _copy_tile(key, at, step, tiles.k, tiles.k_full, tiles.k_empty)
            _copy_tile(value, at, step, tiles.v, tiles.v_full, tiles.v_empty)
            step += 1


@gluon.jit
def _scores(queries, step, tiles, SUMS: gl.constexpr):
    """Start to multiply queries with a tile of keys, once it has arrived."""
    STAGES: gl.constexpr = tiles.k.shape[0]
    KEYS: gl.constexpr = tiles.k.shape[1]
    ROWS: gl.constexpr = queries.shape[0]
    slot = step % STAGES
    mbarrier.wait(tiles.k_full.index(slot), step // STAGES & 1)
    k = tiles.k.index(slot).permute((1, 0))
    none = gl.zeros((ROWS, KEYS), gl.float32, SUMS)
    return warpgroup_mma(queries, k, none, use_acc=False, is_async=True)


@gluon.jit
def _weights(
    scores,
    at,
    own,
    largest,
    total,
    MIXED: gl.constexpr,
    SCALE: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Weights from scores of the tile at slot `at`: the new state, the old one's factor, weights.

    With MASKED a token sees no slot after its `own`, and may have seen no slot at all.
    """
    if MASKED:
        slot = at + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(slot[None, :] <= own[:, None], scores, float("-inf"))
    higher = gl.maximum(largest, gl.max(scores, 1) * SCALE)
    base = higher
    if MASKED:
        base = gl.where(higher == float("-inf"), 0.0, higher)
    fade = gl.exp2(largest - base)
    weight = gl.exp2(scores * SCALE - base[:, None])
    total = total * fade + gl.sum(weight, 1)
    fade = gl.convert_layout(fade, gl.SliceLayout(1, MIXED))
    weight = gl.convert_layout(weight.to(gl.bfloat16), gl.DotOperandLayout(0, MIXED, 2))
    return higher, total, fade, weight


@gluon.jit
def _next(
    queries, tile, before, turns, tiles, own, largest, total, mixed, weight,
    PART: gl.constexpr, SUMS: gl.constexpr, MIXED: gl.constexpr, SCALE: gl.constexpr,
    TURNS: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add the values of the tile before `tile`, and meanwhile compute the weights of `tile`.

    The pipeline has had `before` tiles before this block, and the groups so many `turns`. A wait
    for values comes before that for the sums, although only the next step needs them: it keeps the
    compiler from moving the weights' arithmetic after the latter.
    """
    STAGES: gl.constexpr = tiles.k.shape[0]
    KEYS: gl.constexpr = tiles.k.shape[1]
    step = before + tile
    previous = (step - 1) % STAGES
    if TURNS:
        mbarrier.wait(tiles.turn.index(PART), (turns + tile - 1 & 1) ^ (1 - PART))
    scores = _scores(queries, step, tiles, SUMS)
    mixed = warpgroup_mma(weight, tiles.v.index(previous), mixed, is_async=True)
    if TURNS:
        mbarrier.arrive(tiles.turn.index(1 - PART))
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(tiles.k_empty.index(step % STAGES))
    largest, total, fade, weight = _weights(
        scores, tile * KEYS, own, largest, total, MIXED, SCALE, MASKED
    )
    mbarrier.wait(tiles.v_full.index(step % STAGES), step // STAGES & 1)
    mixed, weight = warpgroup_mma_wait(0, deps=(mixed, weight))
    mbarrier.arrive(tiles.v_empty.index(previous))
    return largest, total, mixed * fade[:, None], weight


@gluon.jit
def _clear(tile, filled):
    """Let the rows from `filled` on be zero: no weight of zero makes a number of what is not one.

    Both groups do this, each before it reads the tile. What they write is the same.
    """
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    values = tile.load(FLAT)
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, FLAT))
    tile.store(gl.where((row < filled)[:, None], values, 0.0))
    fence_async_shared()


@gluon.jit
def _store(mixed, total, place, out, head, token, steps, HEADS: gl.constexpr):
    """Divide by the sums of weights, and write the result through `place` in shared memory."""
    ROWS: gl.constexpr = place.shape[0]
    SIZE: gl.constexpr = place.shape[1]
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    share = 1 / gl.where(total == 0.0, 1.0, total)
    share = gl.convert_layout(share, gl.SliceLayout(1, mixed.type.layout))
    place.store((mixed * share[:, None]).to(gl.bfloat16))
    values = place.load(FLAT)
    token += gl.arange(0, ROWS, gl.SliceLayout(1, FLAT))
    size = gl.arange(0, SIZE, gl.SliceLayout(0, FLAT))
    line = gl.program_id(2).to(gl.int64) * steps + token
    at = line[:, None] * (HEADS * SIZE) + head * SIZE + size[None, :]
    gl.store(out + at, values, mask=(token < steps)[:, None])
    fence_async_shared()


@gluon.jit
def _attend(
    last, out, steps, tiles,
    PART: gl.constexpr, HEADS: gl.constexpr, SCALE: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One group of multiplying warps: its 64 tokens of each block."""
    ROWS: gl.constexpr = tiles.q.shape[1]
    SIZE: gl.constexpr = tiles.q.shape[2]
    STAGES: gl.constexpr = tiles.k.shape[0]
    KEYS: gl.constexpr = tiles.k.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    newest = gl.load(last + gl.program_id(2))
    before = 0
    turns = 0
    for i in range(_rounds(steps, HEADS, 2 * ROWS)):
        head, token, first, many = _place(_block_of(i), newest, steps, HEADS, 2 * ROWS, KEYS)
        token += PART * ROWS
        first += PART * ROWS
        own = first + gl.arange(0, ROWS, ROW)
        full = gl.minimum(gl.maximum(first + 1, 0) // KEYS, many)
        largest = gl.full((ROWS,), float("-inf"), gl.float32, ROW)
        total = gl.zeros((ROWS,), gl.float32, ROW)
        mixed = gl.zeros((ROWS, SIZE), gl.float32, MIXED)
        queries = tiles.q.index(i % 2 * 2 + PART)
        mbarrier.wait(tiles.q_full.index(i % 2), i // 2 & 1)
        if many > 0:
            scores = warpgroup_mma_wait(0, deps=(_scores(queries, before, tiles, SUMS),))
            mbarrier.arrive(tiles.k_empty.index(before % STAGES))
            largest, total, _, weight = _weights(scores, 0, own, largest, total, MIXED, SCALE, True)
            mbarrier.wait(tiles.v_full.index(before % STAGES), before // STAGES & 1)
            for tile in range(1, full):
                largest, total, mixed, weight = _next(
                    queries, tile, before, turns, tiles, own, largest, total, mixed, weight,
                    PART, SUMS, MIXED, SCALE, TURNS, False,
                )  # fmt: skip
            for tile in range(gl.maximum(full, 1), many):
                largest, total, mixed, weight = _next(
                    queries, tile, before, turns, tiles, own, largest, total, mixed, weight,
                    PART, SUMS, MIXED, SCALE, TURNS, True,
                )  # fmt: skip
            final = (before + many - 1) % STAGES
            if many * KEYS > newest + 1:
                _clear(tiles.v.index(final), newest + 1 - (many - 1) * KEYS)
            mixed = warpgroup_mma(weight, tiles.v.index(final), mixed, is_async=True)
            mixed = warpgroup_mma_wait(0, deps=(mixed,))
            mbarrier.arrive(tiles.v_empty.index(final))
            before += many
            turns += many - 1
        _store(mixed, total, queries, out, head, token, steps, HEADS)
        mbarrier.arrive(tiles.q_empty.index(i % 2))


@gluon.jit(do_not_specialize=["steps", "slots"])
def attend_many(
    q,
    key,
    value,
    last,
    out,
    steps,
    slots,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    SIZE: gl.constexpr,
    SCALE: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
):
    """Like `attend_many` in `moec.kernels.triton.prefill.attend_many`, for blocks of 128 tokens.

    Grid (any number of programs, 1, batch). With TURNS a group starts its products when the other
    has started its own. Launch it with 4 warps. Descriptors: q, key, value.
    """
    gl.static_assert(ROWS == 128, "two groups of 64 tokens")
    tiles = Tiles(
        gl.allocate_shared_memory(q.dtype, [4, ROWS // 2, SIZE], q.layout),
        gl.allocate_shared_memory(key.dtype, [STAGES, KEYS, SIZE], key.layout),
        gl.allocate_shared_memory(value.dtype, [STAGES, KEYS, SIZE], value.layout),
        _barriers(2, 1),
        _barriers(2, 2),  # both groups have written their results
        _barriers(STAGES, 1),
        _barriers(STAGES, 2),  # both groups have multiplied the tile
        _barriers(STAGES, 1),
        _barriers(STAGES, 2),
        _barriers(2, 1),
    )
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (last, out, steps, tiles, 0, HEADS, SCALE, TURNS)),
            (_attend, (last, out, steps, tiles, 1, HEADS, SCALE, TURNS)),
            (_copy, (q, key, value, last, steps, slots, tiles, HEADS, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )
