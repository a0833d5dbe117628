"""The sum over ranks, with residual, RMS norm and FP8 quantisation, in one kernel.

Each rank writes its partial sums straight into the memory of its peers, over NVLink, in words of
eight bytes: two bf16 values and the number of the call. The reader polls for that number, with all
of a thread's words in flight at once. So there are no flags, no fences and no barrier: a call waits
for one trip. Two buffers take turns: a rank can be one call ahead of another, never two, because
every call needs all ranks. Calls are counted in device memory, so that CUDA graphs can replay them.

The sums are in the order of the ranks, in float32, and rounded once: all ranks get the same bits.

With many rows on four GPUs, what is sent takes longer than a trip. Then each row has an owner: the
others send it their parts, and it sends them the sum (two-shot). That is half of what all ranks
would send to all.
"""

import triton
import triton.language as tl

from moec.kernels.triton.overlap import next_may_start, wait

#: PTX that writes a word into the memory of a peer, if the last operand is not 0
STORE = """{
.reg .pred p;
setp.ne.s32 p, $3, 0;
@p st.relaxed.sys.global.b64 [$1], $2;
mov.b32 $0, 0;
}"""


def poll(peers: int, words: int) -> tuple[str, str]:
    """PTX that waits for `words` words of each peer, with all loads in flight; its constraints.

    Operands: the values, peers x words; then as many addresses; then the number of the call, once
    for each of the words.
    """
    count = peers * words
    lines = ["{", ".reg .pred p;", f".reg .b64 w<{count}>;", f".reg .b32 c<{count}>, bad;"]
    lines += ["AGAIN:"]
    lines += [f"ld.relaxed.sys.global.b64 w{i}, [${count + i}];" for i in range(count)]
    lines += [f"mov.b64 {{${i}, c{i}}}, w{i};" for i in range(count)]
    lines += ["mov.b32 bad, 0;"]
    for i in range(count):
        lines += [f"xor.b32 c{i}, c{i}, ${2 * count + i % words};", f"or.b32 bad, bad, c{i};"]
    lines += ["setp.ne.s32 p, bad, 0;", "@p bra AGAIN;", "}"]
    return "\n".join(lines), ",".join(["=&r"] * count + ["l"] * count + ["r"] * words)


@triton.jit
def _halves(pair):
    """The two bf16 values of a word of 32 bits, in float32."""
    low = (pair << 16).to(tl.float32, bitcast=True)
    return low, (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _pair(low, high):
    """The inverse of `_halves`, for values that bf16 holds."""
    low = (low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    return (high.to(tl.int32, bitcast=True) & -65536) | low


@triton.jit
def _rounded(x):
    return x.to(tl.bfloat16).to(tl.float32)


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
        pair = _pair(_rounded(low), _rounded(high))
    return pair


@triton.jit
def _push_to(peer, mine, peers, place, inside, call, STORE: tl.constexpr):
    """Write the pairs `mine` of this rank into the memory of a peer."""
    word = (call.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    there = tl.load(peers + peer).to(tl.pointer_type(tl.int64)) + place
    tl.inline_asm_elementwise(
        STORE,
        "=r,l,l,r",
        [there, word, inside.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _push(
    mine, peers, place, inside, call, RANK: tl.constexpr, WORLD: tl.constexpr, STORE: tl.constexpr
):
    """Write the pairs `mine` of this rank into the memory of all its peers."""
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            _push_to(peer, mine, peers, place, inside, call, STORE)


@triton.jit
def _arrived_from(
    peer,
    here,
    call,
    slot,
    stride,
    POLL: tl.constexpr,
    KINDS: tl.constexpr,
    PACK: tl.constexpr,
):
    """Wait for the pairs of one peer; those of rank 0 would be at `here`."""
    return tl.inline_asm_elementwise(
        POLL,
        KINDS,
        [here + (slot + peer) * stride, call + tl.zeros(here.shape, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=PACK,
    )


@triton.jit
def _arrived(
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
    """Wait for the pairs of each peer, in order; those of rank 0 would be at `here`."""
    if WORLD == 2:
        got = (_arrived_from(1 - RANK, here, call, slot, stride, POLL, KINDS, PACK),)
    else:
        want = call + tl.zeros(here.shape, tl.int32)
        first: tl.constexpr = 1 if RANK == 0 else 0
        second: tl.constexpr = 2 if RANK <= 1 else 1
        third: tl.constexpr = 3 if RANK <= 2 else 2
        got = tl.inline_asm_elementwise(
            POLL,
            KINDS,
            [
                here + (slot + first) * stride,
                here + (slot + second) * stride,
                here + (slot + third) * stride,
                want,
            ],
            dtype=(tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=PACK,
        )
    return got


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
    got = _arrived(here, call, slot, stride, RANK, WORLD, POLL, KINDS, PACK)
    low = tl.zeros(mine.shape, tl.float32)
    high = tl.zeros(mine.shape, tl.float32)
    for peer in tl.static_range(WORLD):
        if peer == RANK:
            one, other = _halves(mine)
        else:
            one, other = _halves(got[peer if peer < RANK else peer - 1])
        low += one
        high += other
    return low, high


@triton.jit
def _normed(value, factor, gain):
    return _rounded(_rounded(value * factor) * gain)


@triton.jit
def _codes(low, high, scale):
    """Pairs of E4M3 values, in the order of memory."""
    first = (low / scale).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int16)
    second = (high / scale).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int16)
    return (second << 8) | first


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
    quantised, in codes (pairs, int16) and scale (float32 [tokens]). calls, int32 [ROWS], counts the
    calls that had a row. peers, int64 [WORLD], are the addresses of the ranks' buffers, int64 [2,
    WORLD, ROWS, dim / 2]. With OWNED a row has an owner, which alone adds it up.
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
        _push_to(owner, mine, peers, place, inside, call, STORE)
        mine = _arrived_from(owner, here + at, call, slot, stride, POLL_ONE, KINDS_ONE, PACK)
    else:
        if not OWNED:
            _push(mine, peers, place, inside, call, RANK, WORLD, STORE)
        if ADD:
            skip = tl.load(x + row * HALF + at, mask=inside, other=0)
        low, high = _gather(mine, here + at, call, slot, stride, RANK, WORLD, POLL, KINDS, PACK)
        if ADD:
            one, other = _halves(skip)
            low, high = low + one, high + other
        mine = _pair(_rounded(low), _rounded(high))
        if OWNED:
            _push(mine, peers, place, inside, call, RANK, WORLD, STORE)
    low, high = _halves(mine)
    tl.store(total + row * HALF + at, mine, mask=inside)
    if NORM:
        squares = tl.where(inside, low * low + high * high, 0.0)
        factor = tl.rsqrt(tl.sum(squares, 0) / DIM + EPS)
        one, other = _halves(gains)  # zeros outside of the row
        low, high = _normed(low, factor, one), _normed(high, factor, other)
        if NARROW:
            most = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 0)
            step = tl.maximum(most / 448.0, 1e-12)
            tl.store(codes + row * HALF + at, _codes(low, high, step), mask=inside)
            tl.store(scale + row, step)
        else:
            tl.store(normed + row * HALF + at, _pair(low, high), mask=inside)
    else:
        tl.debug_barrier()  # all warps have read the number of the call; a norm waits for them too
    tl.store(calls + row, call)


@triton.jit
def best_of_block(
    logits,
    values,
    tokens_in,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The largest of BLOCK logits, bf16 [rows, VOCAB], and its place; of equal ones the first.

    Grid (rows, BLOCKS). It writes values, float32 [rows, BLOCKS], and tokens_in, int32.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    start = row.to(tl.int64) * VOCAB
    found = tl.load(logits + start + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
    most, place = tl.max(found, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(values + row * BLOCKS + block, most)
    # a place among NaNs is of no use, but it must be one
    tl.store(tokens_in + row * BLOCKS + block, tl.minimum(block * BLOCK + place, VOCAB - 1))


@triton.jit
def likeliest(
    values,
    tokens_in,
    out,
    calls,
    peers,
    FIRST: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_2: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    ROWS: tl.constexpr,
    STORE: tl.constexpr,
    POLL: tl.constexpr,
    KINDS: tl.constexpr,
):
    """The token with the largest logit of all ranks; of equal ones the first.

    Grid (rows). values and tokens_in are what `best_of_block` found in the rank's own part of the
    vocabulary, whose first token is FIRST. It writes out, int64 [rows]. calls and peers are as in
    `all_reduce`; a buffer is int64 [2, WORLD, ROWS, 2].
    """
    row, at = tl.program_id(0), tl.arange(0, 2)
    block = tl.arange(0, BLOCKS_2)
    call = tl.load(calls + row) + 1
    slot = (call & 1) * WORLD
    stride: tl.constexpr = ROWS * 2
    known = block < BLOCKS
    each = tl.load(values + row * BLOCKS + block, mask=known, other=float("-inf"))
    own, place = tl.max(each, 0, return_indices=True, return_indices_tie_break_left=True)
    token = FIRST + tl.load(tokens_in + row * BLOCKS + tl.minimum(place, BLOCKS - 1))
    mine = tl.where(at == 0, own.to(tl.int32, bitcast=True), token)
    inside = at < 2
    _push(mine, peers, (slot + RANK) * stride + row * 2 + at, inside, call, RANK, WORLD, STORE)
    here = tl.load(peers + RANK).to(tl.pointer_type(tl.int64)) + row * 2 + at
    got = _arrived(here, call, slot, stride, RANK, WORLD, POLL, KINDS, 1)
    best = float("-inf")
    chosen = 0
    for peer in tl.static_range(WORLD):
        both = mine if peer == RANK else got[peer if peer < RANK else peer - 1]
        logit = tl.sum(tl.where(at == 0, both, 0), 0).to(tl.float32, bitcast=True)
        other = tl.sum(tl.where(at == 1, both, 0), 0)
        chosen = tl.where(logit > best, other, chosen)
        best = tl.maximum(logit, best)
    tl.store(out + row, chosen.to(tl.int64))
    tl.store(calls + row, call)


@triton.jit(do_not_specialize=["first"])
def embedding_part(
    ids,
    table,
    out,
    first,
    VOCAB: tl.constexpr,
    DIM: tl.constexpr,
    DIM_2: tl.constexpr,
):
    """Rows of table, bf16 [VOCAB, dim], for ids, int64 [tokens], less `first`; else zeros.

    Grid (tokens). It writes out, bf16 [tokens, dim].
    """
    token, at = tl.program_id(0), tl.arange(0, DIM_2)
    row = tl.load(ids + token) - first
    known = (row >= 0) & (row < VOCAB)
    inside = at < DIM
    values = tl.load(table + row * DIM + at, mask=inside & known, other=0.0)
    tl.store(out + token.to(tl.int64) * DIM + at, values, mask=inside)
