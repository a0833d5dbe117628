"""The sum over ranks of many rows, with residual, RMS norm and FP8 quantisation, in two kernels.

Each rank owns a share of the rows, one after another. `send_parts` writes a rank's partial sums
into the memory of the rows' owners, over NVLink. `add_owned` adds up a rank's own rows and writes
what follows from them, a norm or quantised values, into the memory of all ranks. After each kernel
the ranks meet at a barrier. So a row is added up and normed once, and what travels back is the
norm's result, which may be half as large as the sum.

The sums are in the order of the ranks, in float32, and rounded once: all ranks get the same bits.
Only the owner of a row has its sum, unless all of them are asked for. The next sum over ranks needs
no other rows of it.

The memory of a rank that its peers write into is int32 [WORLD, SHARE_MOST, dim / 2] for the parts,
[WORLD * SHARE_MOST, dim / 2] for the result, as many for the sums, and [WORLD * SHARE_MOST] for the
scales.
"""

import triton
import triton.language as tl

from moec.kernels.peers.words import codes_of, halves, normed_of, pair_of, rounded


@triton.jit
def _memory(peers, rank):
    """The memory of a rank that its peers write into; its alignment lets 16 bytes go at once."""
    return tl.multiple_of(tl.load(peers + rank).to(tl.pointer_type(tl.int32)), 16)


@triton.jit(do_not_specialize=["tokens", "share"])
def send_parts(
    part,
    peers,
    tokens,
    share,
    DIM: tl.constexpr,
    HALF_2: tl.constexpr,
    SHARE_MOST: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
):
    """Send the rows of part, pairs of bf16 as int32 [tokens, dim / 2], to their owners.

    Grid (share * (WORLD - 1)): neighbouring programs write to different peers. peers, int64
    [WORLD], are the addresses of the ranks' memory.
    """
    HALF: tl.constexpr = DIM // 2
    program, at = tl.program_id(0), tl.arange(0, HALF_2)
    owner = (RANK + 1 + program % (WORLD - 1)) % WORLD
    place = program // (WORLD - 1)
    row = owner * share + place
    if row < tokens:
        pairs = tl.load(part + row.to(tl.int64) * HALF + at, mask=at < HALF)
        there = _memory(peers, owner) + (RANK * SHARE_MOST + place).to(tl.int64) * HALF
        tl.store(there + at, pairs, mask=at < HALF)


@triton.jit(do_not_specialize=["tokens", "share"])
def add_owned(
    x,
    part,
    gain,
    total,
    peers,
    tokens,
    share,
    DIM: tl.constexpr,
    HALF_2: tl.constexpr,
    EPS: tl.constexpr,
    NARROW: tl.constexpr,
    WHOLE: tl.constexpr,
    SHARE_MOST: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
):
    """total = x plus the sum over ranks of part, for the rank's own rows; its RMS norm for all.

    Grid (share). x, part and total are pairs of bf16, as int32 [tokens, dim / 2]. The norm, or with
    NARROW its quantised values and scales, goes to all ranks' memory; with WHOLE the sum does too.
    """
    HALF: tl.constexpr = DIM // 2
    PARTS: tl.constexpr = WORLD * SHARE_MOST * HALF
    place, at, each = tl.program_id(0), tl.arange(0, HALF_2), tl.arange(0, 2 * HALF_2)
    row, inside = RANK * share + place, at < HALF
    if row < tokens:
        start = row.to(tl.int64) * HALF
        here = _memory(peers, RANK) + place.to(tl.int64) * HALF
        low = tl.zeros((HALF_2,), tl.float32)
        high = tl.zeros((HALF_2,), tl.float32)
        for rank in tl.static_range(WORLD):
            if rank == RANK:
                pairs = tl.load(part + start + at, mask=inside, other=0)
            else:
                pairs = tl.load(here + rank * SHARE_MOST * HALF + at, mask=inside, other=0)
            one, other = halves(pairs)
            low += one
            high += other
        one, other = halves(tl.load(x + start + at, mask=inside, other=0))
        low, high = rounded(low + one), rounded(high + other)
        sums = pair_of(low, high)
        tl.store(total + start + at, sums, mask=inside)
        factor = tl.rsqrt(tl.sum(low * low + high * high, 0) / DIM + EPS)
        one, other = halves(tl.load(gain + at, mask=inside, other=0))
        low, high = normed_of(low, factor, one), normed_of(high, factor, other)
        if NARROW:
            codes, scale = codes_of(low, high)
        else:
            normed = pair_of(low, high)
        for peer in tl.static_range(WORLD):
            base = _memory(peers, peer) + PARTS
            if NARROW:
                there = base.to(tl.pointer_type(tl.float8e4nv)) + 2 * start
                tl.store(there + each, codes, mask=each < DIM)
                scales = (base + 2 * PARTS).to(tl.pointer_type(tl.float32))
                tl.store(scales + row, scale)
            else:
                tl.store(base + start + at, normed, mask=inside)
            if WHOLE:
                tl.store(base + PARTS + start + at, sums, mask=inside)
