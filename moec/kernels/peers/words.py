"""Words that one GPU writes into the memory of another, and values of pairs of bf16, in Triton.

A word has eight bytes: two bf16 values and the number of the call. The reader polls for that
number, with all of a thread's words in flight at once. So there are no flags, no fences and no
barrier: a call waits for one trip.
"""

import triton
import triton.language as tl

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
def halves(pair):
    """The two bf16 values of a word of 32 bits, in float32."""
    low = (pair << 16).to(tl.float32, bitcast=True)
    return low, (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def pair_of(low, high):
    """The inverse of `halves`, for values that bf16 holds."""
    low = (low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    return (high.to(tl.int32, bitcast=True) & -65536) | low


@triton.jit
def rounded(x):
    """x rounded to bf16, in float32."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def push_to(peer, mine, peers, place, inside, call, STORE: tl.constexpr):
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
def push(
    mine, peers, place, inside, call, RANK: tl.constexpr, WORLD: tl.constexpr, STORE: tl.constexpr
):
    """Write the pairs `mine` of this rank into the memory of all its peers."""
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            push_to(peer, mine, peers, place, inside, call, STORE)


@triton.jit
def arrived_from(
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
def arrived(
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
        got = (arrived_from(1 - RANK, here, call, slot, stride, POLL, KINDS, PACK),)
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
def normed_of(value, factor, gain):
    """A value of an RMS norm, rounded as in eager: after the factor, and after the gain."""
    return rounded(rounded(value * factor) * gain)


@triton.jit
def codes_of(low, high):
    """A row of pairs as E4M3 values, twice as many, in the order of memory; and their scale."""
    scale = tl.maximum(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 0) / 448.0, 1e-12)
    return tl.interleave(low / scale, high / scale).to(tl.float8e4nv), scale
