"""The sum over ranks of a few rows, with residual, RMS norm and FP8 quantisation, in one kernel.

Each rank writes its partial sums straight into the memory of its peers, over NVLink, as words
(`moec.kernels.peers.words`). Two buffers take turns: a rank can be one call ahead of another, never
two, because every call needs all ranks. Calls are counted in device memory, so that CUDA graphs can
replay them.

The sums are in the order of the ranks, in float32, and rounded once: all ranks get the same bits.

With many rows on four GPUs, what is sent takes longer than a trip. Then each row has an owner: the
others send it their parts, and it sends them the sum (two-shot). That is half of what all ranks
would send to all.
"""

import triton
import triton.language as tl

from moec.kernels.peers.words import (
    arrived,
    arrived_from,
    codes_of,
    halves,
    normed_of,
    pair_of,
    push,
    push_to,
    rounded,
)
from moec.kernels.triton.overlap import next_may_start, wait


@triton.jit
def _own(part, inside, stride, PARTS: tl.constexpr):
    """The rank's own sums: pairs of bf16, or the sum of PARTS partial sums in float32."""
    if PARTS == 1:
        pair = tl.load(part, mask=inside, other=0)
    else:
        low = tl.zeros(inside.shape, tl.float32)
        high = tl.zeros(inside.shape, tl.float32)
        for i in tl.static_range(PARTS):
            both = tl.load(part + i * stride, mask=inside, other=0)
            low += both.to(tl.int32).to(tl.float32, bitcast=True)  # the lower half of the word
            high += (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        pair = pair_of(rounded(low), rounded(high))
    return pair


@triton.jit
def _gather(
    mine,
    here,
    call,
    slot,
    stride,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    POLL: tl.constexpr,
    KINDS: tl.constexpr,
    PACK: tl.constexpr,
):
    """The sums over all ranks of pairs of bf16, in float32."""
    got = arrived(here, call, slot, stride, RANK, WORLD, POLL, KINDS, PACK)
    low = tl.zeros(mine.shape, tl.float32)
    high = tl.zeros(mine.shape, tl.float32)
    for peer in tl.static_range(WORLD):
        if peer == RANK:
            one, other = halves(mine)
        else:
            one, other = halves(got[peer if peer < RANK else peer - 1])
        low += one
        high += other
    return low, high


@triton.jit(do_not_specialize=["tokens"])
def all_reduce(
    x,
    part,
    gain,
    total,
    normed,
    codes,
    scale,
    calls,
    peers,
    tokens,
    DIM: tl.constexpr,
    HALF_2: tl.constexpr,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    NARROW: tl.constexpr,
    PARTS: tl.constexpr,
    OWNED: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    ROWS: tl.constexpr,
    STORE: tl.constexpr,
    POLL: tl.constexpr,
    KINDS: tl.constexpr,
    POLL_ONE: tl.constexpr,
    KINDS_ONE: tl.constexpr,
    PACK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """total = the sum over ranks of part, plus x with ADD; with NORM its RMS norm times gain.

    Grid (tokens). All rows are pairs of bf16, as int32 [tokens, dim / 2]; with PARTS above 1, part
    is pairs of float32, as int64 [PARTS, tokens, dim / 2]. The norm is in normed, or with NARROW
    quantised, in codes (E4M3 [tokens, dim]) and scale (float32 [tokens]). calls, int32 [ROWS],
    counts the calls that had a row. peers, int64 [WORLD], are the addresses of the ranks' buffers,
    int64 [2, WORLD, ROWS, dim / 2]. With OWNED a row has an owner, which alone adds it up.
    """
    HALF: tl.constexpr = DIM // 2
    row, column = tl.program_id(0), tl.arange(0, HALF_2)
    inside, at = column < HALF, tl.minimum(column, HALF - 1)
    next_may_start(OVERLAP)
    if NORM:
        gains = tl.load(gain + at, mask=inside, other=0)
    here = tl.load(peers + RANK).to(tl.pointer_type(tl.int64)) + row * HALF
    wait(OVERLAP)
    call = tl.load(calls + row) + 1
    slot = (call & 1) * WORLD
    stride: tl.constexpr = ROWS * HALF
    mine = _own(part + row * HALF + at, inside, tokens * HALF, PARTS)
    place = (slot + RANK) * stride + row * HALF + at
    owner = row % WORLD
    if OWNED and owner != RANK:
        push_to(owner, mine, peers, place, inside, call, STORE)
        mine = arrived_from(owner, here + at, call, slot, stride, POLL_ONE, KINDS_ONE, PACK)
    else:
        if not OWNED:
            push(mine, peers, place, inside, call, RANK, WORLD, STORE)
        if ADD:
            skip = tl.load(x + row * HALF + at, mask=inside, other=0)
        low, high = _gather(mine, here + at, call, slot, stride, RANK, WORLD, POLL, KINDS, PACK)
        if ADD:
            one, other = halves(skip)
            low, high = low + one, high + other
        mine = pair_of(rounded(low), rounded(high))
        if OWNED:
            push(mine, peers, place, inside, call, RANK, WORLD, STORE)
    low, high = halves(mine)
    tl.store(total + row * HALF + at, mine, mask=inside)
    if NORM:
        squares = tl.where(inside, low * low + high * high, 0.0)
        factor = tl.rsqrt(tl.sum(squares, 0) / DIM + EPS)
        one, other = halves(gains)  # zeros outside of the row
        low, high = normed_of(low, factor, one), normed_of(high, factor, other)
        if NARROW:
            each = tl.arange(0, 2 * HALF_2)
            narrow, step = codes_of(low, high)
            tl.store(codes + row * DIM + each, narrow, mask=each < DIM)
            tl.store(scale + row, step)
        else:
            tl.store(normed + row * HALF + at, pair_of(low, high), mask=inside)
    else:
        tl.debug_barrier()  # all warps have read the number of the call; a norm waits for them too
    tl.store(calls + row, call)
