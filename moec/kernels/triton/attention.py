"""Triton kernels of decode attention, one new token per sequence, over buffers of keys and values.

    rope_append   rotates and normalises queries and keys, and writes keys and values to their slots
    attend        does that for one token per sequence, then flash decoding: each program attends to
                  one split of the keys
    combine       combines the splits of a head

A buffer is [batch, kv_heads, slots, size]; slot `last` of a sequence holds its newest token. A
chunked layer's buffer holds the current chunk from slot 0. So causal attention over its slots is
chunked attention.
"""

import triton
import triton.language as tl

from moec.kernels.triton.overlap import next_may_start, wait


@triton.jit(do_not_specialize=["steps", "slots"])
def rope_append(
    qkv,
    cos,
    sin,
    temperature,
    key,
    value,
    last,
    q,
    steps,
    slots,
    KV_HEADS: tl.constexpr,
    KV_HEADS_2: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Place the queries, keys and values of `steps` tokens per sequence.

    Grid (batch * steps, GROUP + 2): a program treats kv_heads heads of one token. The last but one
    program of a token treats its keys, the last one its values.

    qkv bf16 [batch, steps, (GROUP + 2) * kv_heads * size]; cos, sin float32 [batch, steps, size/2];
    temperature float32 [batch, steps]. Token i of `steps` goes to slot last - steps + 1 + i.
    """
    token, part = tl.program_id(0), tl.program_id(1)
    head, pair = tl.arange(0, KV_HEADS_2), tl.arange(0, SIZE // 2)
    inside = head[:, None] < KV_HEADS
    next_may_start(OVERLAP)
    wait(OVERLAP)
    width: tl.constexpr = KV_HEADS * SIZE
    start = token.to(tl.int64) * ((GROUP + 2) * width) + part * width
    even_at = head[:, None] * SIZE + 2 * pair[None, :]
    even = tl.load(qkv + start + even_at, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(qkv + start + even_at + 1, mask=inside, other=0.0).to(tl.float32)
    if part <= GROUP:
        if ROPE:
            c = tl.load(cos + token * (SIZE // 2) + pair)[None, :]
            s = tl.load(sin + token * (SIZE // 2) + pair)[None, :]
            turned = even * c - odd * s
            odd = (even * s + odd * c).to(tl.bfloat16).to(tl.float32)
            even = turned.to(tl.bfloat16).to(tl.float32)
        if NORM:
            square = tl.sum(even * even + odd * odd, 1) / SIZE
            root = tl.rsqrt(square + EPS)[:, None]
            even = (even * root).to(tl.bfloat16).to(tl.float32)
            odd = (odd * root).to(tl.bfloat16).to(tl.float32)
    if part < GROUP:
        if TEMPERATURE:
            factor = tl.load(temperature + token)
            even, odd = even * factor, odd * factor
        q_at = q + token.to(tl.int64) * (GROUP * width) + part * width + even_at
        tl.store(q_at, even.to(tl.bfloat16), mask=inside)
        tl.store(q_at + 1, odd.to(tl.bfloat16), mask=inside)
    else:
        row = token // steps
        slot = tl.load(last + row) - steps + 1 + token % steps
        base = (row * KV_HEADS + head[:, None]).to(tl.int64) * slots + slot
        at = base * SIZE + 2 * pair[None, :]
        if part == GROUP:
            tl.store(key + at, even.to(tl.bfloat16), mask=inside)
            tl.store(key + at + 1, odd.to(tl.bfloat16), mask=inside)
        else:
            tl.store(value + at, even.to(tl.bfloat16), mask=inside)
            tl.store(value + at + 1, odd.to(tl.bfloat16), mask=inside)


@triton.jit
def _share(length, SPLITS: tl.constexpr, KEYS: tl.constexpr):
    """How many keys each split has, a multiple of KEYS; there are at most SPLITS splits."""
    return tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS


@triton.jit
def _placed(
    values,
    partners,
    odd,
    cos,
    sin,
    at,
    SIZE: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
):
    """Rotate and normalise heads [n, SIZE], in float32; partners holds the other of each pair."""
    if ROPE:
        c, s = tl.load(cos + at)[None, :], tl.load(sin + at)[None, :]
        values = values * c + tl.where(odd[None, :], partners, -partners) * s
        values = values.to(tl.bfloat16).to(tl.float32)
    if NORM:
        root = tl.rsqrt(tl.sum(values * values, 1) / SIZE + EPS)[:, None]
        values = (values * root).to(tl.bfloat16).to(tl.float32)
    return values


@triton.jit
def _mix(queries, k, v, seen, largest, total, mixed, SCALE: tl.constexpr):
    """Attend to more keys: the new largest score, sum of weights and weighted sum of values."""
    scores = tl.dot(queries, tl.trans(k)) * (SCALE * 1.44269504)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(largest, tl.max(scores, 1))
    fade = tl.exp2(largest - higher)
    weight = tl.exp2(scores - higher[:, None])
    total = total * fade + tl.sum(weight, 1)
    return higher, total, mixed * fade[:, None] + tl.dot(weight.to(tl.bfloat16), v)


@triton.jit(do_not_specialize=["slots"])
def attend(
    qkv,
    cos,
    sin,
    temperature,
    key,
    value,
    last,
    parts,
    most,
    sums,
    slots,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_2: tl.constexpr,
    SIZE: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    SCALE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`rope_append` for one token per sequence, then its attention.

    Grid (batch * kv_heads, SPLITS). qkv and the tables are those of `rope_append`. The kernel
    writes for each split the weighted sum of values, parts float32 [SPLITS, batch, heads, size];
    the sum of weights, sums [SPLITS, batch, heads]; and the largest score, most. A weight is 2 to
    the power of a score less most. Splits past the last slot write nothing. The program of the last
    split writes the new key and value, and reads them from its registers. Earlier keys are read
    before the launch that computes `qkv` has ended.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    row, kv_head, batch = program // KV_HEADS, program % KV_HEADS, tl.num_programs(0) // KV_HEADS
    next_may_start(OVERLAP)
    newest = tl.load(last + row)
    share = _share(newest + 1, SPLITS, KEYS)
    begin = split * share
    end = tl.minimum(begin + share, newest + 1)
    stop = tl.minimum(end, newest)
    slot, size = tl.arange(0, KEYS), tl.arange(0, SIZE)
    base = program.to(tl.int64) * slots * SIZE
    place = base + (begin + slot)[:, None].to(tl.int64) * SIZE + size[None, :]
    k = tl.load(key + place, mask=(begin + slot < stop)[:, None], other=0.0)
    v = tl.load(value + place, mask=(begin + slot < stop)[:, None], other=0.0)
    wait(OVERLAP)
    if begin < end:
        width: tl.constexpr = KV_HEADS * SIZE
        head, one = tl.arange(0, GROUP_2), tl.arange(0, 1)[:, None]
        odd, pair = size % 2 == 1, row * (SIZE // 2) + size // 2
        partner = size + 1 - 2 * (size % 2)
        inside = head[:, None] < GROUP
        start = qkv + row.to(tl.int64) * ((GROUP + 2) * width)
        q_at = start + (kv_head * GROUP + head[:, None]) * SIZE
        queries = tl.load(q_at + size[None, :], mask=inside, other=0.0).to(tl.float32)
        swapped = tl.load(q_at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        queries = _placed(queries, swapped, odd, cos, sin, pair, SIZE, ROPE, NORM, EPS)
        if TEMPERATURE:
            queries *= tl.load(temperature + row)
        queries = queries.to(tl.bfloat16)
        largest = tl.full((GROUP_2,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP_2,), tl.float32)
        mixed = tl.zeros((GROUP_2, SIZE), tl.float32)
        if begin < stop:
            largest, total, mixed = _mix(
                queries, k, v, begin + slot < stop, largest, total, mixed, SCALE
            )
        for at in range(begin + KEYS, stop, KEYS):
            seen = at + slot < stop
            place = base + (at + slot)[:, None].to(tl.int64) * SIZE + size[None, :]
            k = tl.load(key + place, mask=seen[:, None], other=0.0)
            v = tl.load(value + place, mask=seen[:, None], other=0.0)
            largest, total, mixed = _mix(queries, k, v, seen, largest, total, mixed, SCALE)
        if end == newest + 1:
            new_at = start + GROUP * width + kv_head * SIZE + one
            new_k = tl.load(new_at + size[None, :]).to(tl.float32)
            new_v = tl.load(new_at + width + size[None, :])
            other = tl.load(new_at + partner[None, :]).to(tl.float32)
            new_k = _placed(new_k, other, odd, cos, sin, pair, SIZE, ROPE, NORM, EPS)
            new_k = new_k.to(tl.bfloat16)
            own = base + newest.to(tl.int64) * SIZE + size[None, :] + one
            tl.store(key + own, new_k)
            tl.store(value + own, new_v)
            score = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32), 1) * (SCALE * 1.44269504)
            higher = tl.maximum(largest, score)
            fade, gain = tl.exp2(largest - higher), tl.exp2(score - higher)
            total = total * fade + gain
            mixed = mixed * fade[:, None] + gain[:, None] * new_v.to(tl.float32)
            largest = higher
        heads: tl.constexpr = KV_HEADS * GROUP
        each = (split * batch + row) * heads + kv_head * GROUP + head
        tl.store(most + each, largest, mask=head < GROUP)
        tl.store(sums + each, total, mask=head < GROUP)
        tl.store(parts + each[:, None] * SIZE + size[None, :], mixed, mask=inside)


@triton.jit
def combine(
    parts,
    most,
    sums,
    last,
    out,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_2: tl.constexpr,
    KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Combine the splits of a head: out bf16 [batch, heads * size]. Grid (batch, HEADS)."""
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    split, size = tl.arange(0, SPLITS_2), tl.arange(0, SIZE)
    next_may_start(OVERLAP)
    wait(OVERLAP)
    length = tl.load(last + row) + 1
    used = split < tl.cdiv(length, _share(length, SPLITS, KEYS))
    each = (split * batch + row) * HEADS + head
    largest = tl.load(most + each, mask=used, other=float("-inf"))
    total = tl.load(sums + each, mask=used, other=0.0)
    part = tl.load(parts + each[:, None] * SIZE + size[None, :], mask=used[:, None], other=0.0)
    weight = tl.exp2(largest - tl.max(largest, 0))
    mixed = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + (row * HEADS + head) * SIZE + size, mixed.to(tl.bfloat16))
