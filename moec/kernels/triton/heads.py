"""Triton kernels of attention over caches of slots, one new token of each sequence, and of heads.

    head_norm       QK-norm of each head, with or without a gain
    rope            rotates the heads of a token
    attend_slots    flash decoding over slots in any order: a mask says which ones a token sees
    combine_slots   combines the splits of a head

A cache is [batch, slots, kv_heads * size], as `moec.graph_builder.ops.cache` describes it.
"""

import triton
import triton.language as tl


@triton.jit
def head_norm(
    x, gain, out, SIZE: tl.constexpr, SIZE_2: tl.constexpr, EPS: tl.constexpr, GAIN: tl.constexpr
):
    """The RMS norm of each head of x, bf16 [heads of all tokens, SIZE]. Grid (heads)."""
    at = tl.arange(0, SIZE_2)
    place, inside = tl.program_id(0).to(tl.int64) * SIZE + at, at < SIZE
    row = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(row * row, 0) / SIZE + EPS)
    row = (row * root).to(tl.bfloat16)
    if GAIN:
        row = (row.to(tl.float32) * tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)).to(
            tl.bfloat16
        )
    tl.store(out + place, row, mask=inside)


@triton.jit
def rope(
    x,
    cos,
    sin,
    out,
    HEADS: tl.constexpr,
    HEADS_2: tl.constexpr,
    HALF: tl.constexpr,
    HALF_2: tl.constexpr,
    ADJACENT: tl.constexpr,
):
    """Rotate the heads of a token, bf16 [tokens, HEADS, 2 * HALF]. Grid (tokens).

    cos and sin are float32 [tokens, HALF]. A pair is two adjacent elements, or elements of the
    same place in the two halves of a head.
    """
    token, head, pair = tl.program_id(0), tl.arange(0, HEADS_2)[:, None], tl.arange(0, HALF_2)
    known = pair < HALF
    inside = (head < HEADS) & known[None, :]
    c = tl.load(cos + token.to(tl.int64) * HALF + pair, mask=known, other=0.0)[None, :]
    s = tl.load(sin + token.to(tl.int64) * HALF + pair, mask=known, other=0.0)[None, :]
    start = (token.to(tl.int64) * HEADS + head) * (2 * HALF)
    first = start + (2 * pair if ADJACENT else pair)[None, :]
    second = first + (1 if ADJACENT else HALF)
    one = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(x + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first, (one * c - two * s).to(tl.bfloat16), mask=inside)
    tl.store(out + second, (one * s + two * c).to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["slots"])
def attend_slots(
    q,
    key,
    value,
    mask,
    parts,
    most,
    sums,
    slots,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_2: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Attention of one token of each sequence over its slots, up to the sum over splits.

    Grid (batch * kv_heads, SPLITS). q bf16 [batch, heads * SIZE]; mask bool [batch, slots]. The
    kernel writes for each split the weighted sum of values, parts float32 [SPLITS, batch, heads,
    SIZE]; the sum of weights, sums [SPLITS, batch, heads]; and the largest score, most, which is
    -inf where the token sees no slot of the split. A weight is 2 to the power of a score less most.
    Keys that no token sees are not read.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    row, kv_head, batch = program // KV_HEADS, program % KV_HEADS, tl.num_programs(0) // KV_HEADS
    heads: tl.constexpr = KV_HEADS * GROUP
    share = tl.cdiv(tl.cdiv(slots, SPLITS), KEYS) * KEYS
    begin = split * share
    end = tl.minimum(begin + share, slots)
    head, size, slot = tl.arange(0, GROUP_2), tl.arange(0, SIZE), tl.arange(0, KEYS)
    inside = head[:, None] < GROUP
    q_at = (row.to(tl.int64) * heads + kv_head * GROUP + head[:, None]) * SIZE + size[None, :]
    queries = tl.load(q + q_at, mask=inside, other=0.0)
    largest = tl.full((GROUP_2,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_2,), tl.float32)
    mixed = tl.zeros((GROUP_2, SIZE), tl.float32)
    start = row.to(tl.int64) * slots
    for at in range(begin, end, KEYS):
        seen = tl.load(mask + start + at + slot, mask=at + slot < end, other=0) != 0
        place = ((start + at + slot)[:, None] * KV_HEADS + kv_head) * SIZE + size[None, :]
        k = tl.load(key + place, mask=seen[:, None], other=0.0)
        v = tl.load(value + place, mask=seen[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(k)) * (SCALE * 1.44269504)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no slot of the split seen so far
        fade = tl.exp2(largest - base)
        weight = tl.exp2(scores - base[:, None])
        total = total * fade + tl.sum(weight, 1)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(tl.bfloat16), v)
        largest = higher
    each = (split * batch + row) * heads + kv_head * GROUP + head
    tl.store(most + each, largest, mask=head < GROUP)
    tl.store(sums + each, total, mask=head < GROUP)
    tl.store(parts + each[:, None].to(tl.int64) * SIZE + size[None, :], mixed, mask=inside)


@triton.jit
def combine_slots(
    parts,
    most,
    sums,
    out,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_2: tl.constexpr,
):
    """Combine the splits of a head: out bf16 [batch, heads * SIZE]. Grid (batch, HEADS)."""
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    split, size = tl.arange(0, SPLITS_2), tl.arange(0, SIZE)
    used = split < SPLITS
    each = (split * batch + row) * HEADS + head
    largest = tl.load(most + each, mask=used, other=float("-inf"))
    total = tl.load(sums + each, mask=used, other=0.0)
    place = each[:, None].to(tl.int64) * SIZE + size[None, :]
    part = tl.load(parts + place, mask=used[:, None], other=0.0)
    weight = tl.exp2(largest - tl.max(largest, 0))
    mixed = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + (row * HEADS + head).to(tl.int64) * SIZE + size, mixed.to(tl.bfloat16))
