"""How a router chooses among up to 256 experts, in Triton: every routing of the spec language.

The names of constants are those of `moec.spec.parts.routing.Routing`. A lane is an expert's column
of a tile of logits. Groups have lanes in a power of 2, of which the last may be empty.
"""

import triton
import triton.language as tl

from moec.kernels.triton.overlap import next_may_start, wait

#: added to the sum that scores are divided by, as in `moec.graph_builder.ops.moe`
SMALLEST_SUM = tl.constexpr(1e-20)


@triton.jit
def _places(values, MOST: tl.constexpr, BF16: tl.constexpr):
    """The place of each value in its row when the largest comes first; MOST from there on.

    Of equal values the first comes first. Values are compared as integers in the same order: a warp
    reduces those in one instruction. Those of BF16 leave room for the number of their lane, which
    makes them unique.
    """
    lane = tl.arange(0, values.shape[1])[None, :]
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 equals 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if BF16:
        bits = (bits & -0x10000) | (values.shape[1] - 1 - lane)
    place = tl.full(values.shape, MOST, tl.int32)
    for number in tl.static_range(MOST):
        found = bits == tl.max(bits, 1)[:, None]
        if not BF16:
            found = lane == tl.min(tl.where(found, lane, values.shape[1]), 1)[:, None]
        place = tl.where(found, number, place)
        bits = tl.where(found, -0x80000000, bits)
    return place


@triton.jit
def _within_groups(values, GROUPS_2: tl.constexpr, EACH_2: tl.constexpr, KEPT: tl.constexpr):
    """`values` in the KEPT best groups of each row, and -inf elsewhere.

    A group is as good as the sum of its two best values.
    """
    rows: tl.constexpr = values.shape[0]
    lane = tl.arange(0, EACH_2)[None, None, :]
    grouped = tl.reshape(values, (rows, GROUPS_2, EACH_2))
    best = tl.max(grouped, 2)
    first = tl.min(tl.where(grouped == best[:, :, None], lane, EACH_2), 2)[:, :, None]
    second = tl.max(tl.where(lane == first, float("-inf"), grouped), 2)
    kept = _places(best + second, KEPT, False) < KEPT
    grouped = tl.where(kept[:, :, None], grouped, float("-inf"))
    return tl.reshape(grouped, (rows, GROUPS_2 * EACH_2))


@triton.jit
def experts_of(
    EXPERTS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_2: tl.constexpr, EACH_2: tl.constexpr
):
    """The expert of each lane, and whether it has one."""
    each: tl.constexpr = EXPERTS // GROUPS
    lane = tl.arange(0, GROUPS_2 * EACH_2)
    known = (lane % EACH_2 < each) & (lane // EACH_2 < GROUPS)
    return lane // EACH_2 * each + lane % EACH_2, known


@triton.jit
def places(
    row,
    more,
    known,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    CHOICE: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPS_2: tl.constexpr,
    EACH_2: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALISE: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """The place of each expert in its row of logits, float32 [rows, lanes], and its weight.

    The chosen experts have a place below TOP_K. more [lanes] is what BIAS adds; known [lanes] says
    which lanes have an expert. Weights are rounded to bf16.
    """
    if SCORE == "sigmoid":
        score = tl.sigmoid(row)
    else:
        score = tl.exp(row - tl.max(row, 1)[:, None])
        if SCORE == "softmax":
            score = score / tl.sum(score, 1)[:, None]
    values = row
    if CHOICE == "scores":
        values = score
    if BIAS:
        values += more[None, :]
    values = tl.where(known[None, :], values, float("-inf"))
    if GROUPS_2 > 1:
        values = _within_groups(values, GROUPS_2, EACH_2, KEPT)
    place = _places(values, TOP_K, CHOICE == "logits")
    taken = place < TOP_K
    if SCORE == "softmax_of_chosen":
        score = score / tl.sum(tl.where(taken, score, 0.0), 1)[:, None]
    if NORMALISE:
        score = score / (tl.sum(tl.where(taken, score, 0.0), 1)[:, None] + SMALLEST_SUM)
    return place, (score * FACTOR).to(tl.bfloat16).to(tl.float32)


@triton.jit
def choose_rows(
    logits,
    bias,
    token,
    tokens,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_2: tl.constexpr,
    EACH_2: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    CHOICE: tl.constexpr,
    BIAS: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALISE: tl.constexpr,
    FACTOR: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The place and the weight of the experts of `token` [rows], [rows, lanes], and their numbers.

    logits, float32 [SPLIT, tokens, experts], are partial sums. Their sum is rounded to bf16, as a
    linear layer would. The numbers are [lanes].
    """
    expert, known = experts_of(EXPERTS, GROUPS, GROUPS_2, EACH_2)
    row = tl.where(known, 0.0, float("-inf"))[None, :]
    for part in tl.static_range(SPLIT):
        at = logits + (part * tokens + token[:, None]) * EXPERTS + expert[None, :]
        # not from L1, which may hold older values
        row += tl.load(at, mask=known[None, :], other=0.0, cache_modifier=".cg")
    more = expert.to(tl.float32)  # of no use without BIAS, but `places` takes it
    if BIAS:
        more = tl.load(bias + expert, mask=known, other=0.0).to(tl.float32)
    place, weight = places(
        row.to(tl.bfloat16).to(tl.float32),
        more,
        known,
        TOP_K,
        SCORE,
        CHOICE,
        BIAS,
        GROUPS_2,
        EACH_2,
        KEPT,
        NORMALISE,
        FACTOR,
    )
    return place, expert, weight


@triton.jit(do_not_specialize=["tokens"])
def choose(
    logits,
    bias,
    chosen,
    weight,
    present,
    tokens,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_2: tl.constexpr,
    EACH_2: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    CHOICE: tl.constexpr,
    BIAS: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALISE: tl.constexpr,
    FACTOR: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write the experts of each token and their weights, the SHARED ones last with a weight of 1.

    Grid (tokens). chosen i32 and weight float32 are [tokens, TOP_K + SHARED]. The kernel sets
    present, i32 [experts], to 1 where a token has chosen the expert; it holds zeros before.
    """
    token, part = tl.program_id(0), tl.arange(0, 16)
    next_may_start(OVERLAP)
    wait(OVERLAP)
    place, expert, found = choose_rows(
        logits,
        bias,
        token + tl.arange(0, 1),
        tokens,
        EXPERTS,
        GROUPS,
        GROUPS_2,
        EACH_2,
        TOP_K,
        SCORE,
        CHOICE,
        BIAS,
        KEPT,
        NORMALISE,
        FACTOR,
        SPLIT,
    )
    start, taken = token * (TOP_K + SHARED), place < TOP_K
    tl.store(chosen + start + place, expert[None, :], mask=taken)
    tl.store(weight + start + place, found, mask=taken)
    tl.store(present + expert[None, :], 1, mask=taken)
    if SHARED > 0:
        at, mine = start + TOP_K + part, part < SHARED
        tl.store(chosen + at, EXPERTS + part, mask=mine)
        tl.store(weight + at, 1.0 + 0.0 * part, mask=mine)


@triton.jit(do_not_specialize=["tokens"])
def arrange(
    chosen,
    present,
    plan,
    place,
    tokens,
    TOKENS_2: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    PLACES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Find which experts run, the shared ones first, and which assignments each of them serves.

    Grid (EXPERTS_2 / 16): a program looks after 16 experts. plan, i32 [slots, 2], holds each one's
    number and how many assignments it serves; place, i32 [slots, PLACES], which. For slots that are
    left over plan holds zeros.
    """
    SLOTS: tl.constexpr = TOP_K + SHARED
    first, token = tl.program_id(0) * 16, tl.arange(0, TOKENS_2)
    expert, every = first + tl.arange(0, 16), tl.arange(0, EXPERTS_2)
    inside = token < tokens
    next_may_start(OVERLAP)
    wait(OVERLAP)
    runs = tl.load(present + every, mask=every < EXPERTS, other=0, cache_modifier=".cg")
    before = SHARED + tl.sum(tl.where(every < first, runs, 0), 0)
    own = tl.full((TOKENS_2, 16), -1, tl.int32)
    for number in tl.static_range(TOP_K):
        at = token * SLOTS + number
        found = tl.load(chosen + at, mask=inside, other=-1, cache_modifier=".cg")
        own = tl.where(found[:, None] == expert[None, :], at[:, None], own)
    mine = (own >= 0).to(tl.int32)
    count = tl.sum(mine, 0)
    slot = before + tl.cumsum((count > 0).to(tl.int32), 0) - 1
    tl.store(place + slot[None, :] * PLACES + tl.cumsum(mine, 0) - 1, own, mask=own >= 0)
    tl.store(plan + 2 * slot, expert, mask=count > 0)
    tl.store(plan + 2 * slot + 1, count, mask=count > 0)
    if first == 0:
        for part in tl.static_range(SHARED):
            tl.store(place + part * PLACES + token, token * SLOTS + TOP_K + part, mask=inside)
            tl.store(plan + 2 * part, EXPERTS + part)
            tl.store(plan + 2 * part + 1, tokens)
        rest = tl.sum(runs, 0) + every
        left = rest < tl.minimum(EXPERTS, tokens * TOP_K)
        tl.store(plan + 2 * (SHARED + rest), 0 * every, mask=left)
        tl.store(plan + 2 * (SHARED + rest) + 1, 0 * every, mask=left)


@triton.jit(do_not_specialize=["tokens"])
def choose_and_arrange(
    logits,
    bias,
    chosen,
    weight,
    plan,
    place,
    tokens,
    TOKENS_2: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_2: tl.constexpr,
    EACH_2: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    CHOICE: tl.constexpr,
    BIAS: tl.constexpr,
    KEPT: tl.constexpr,
    NORMALISE: tl.constexpr,
    FACTOR: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARED: tl.constexpr,
    PLACES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What `choose` and `arrange` do, in one program for all tokens.

    Grid (1). It writes chosen and weight as `choose` does, plan and place as `arrange` does.
    """
    SLOTS: tl.constexpr = TOP_K + SHARED
    token = tl.arange(0, TOKENS_2)
    inside = token < tokens
    next_may_start(OVERLAP)
    wait(OVERLAP)
    number, expert, found = choose_rows(
        logits,
        bias,
        tl.minimum(token, tokens - 1),
        tokens,
        EXPERTS,
        GROUPS,
        GROUPS_2,
        EACH_2,
        TOP_K,
        SCORE,
        CHOICE,
        BIAS,
        KEPT,
        NORMALISE,
        FACTOR,
        SPLIT,
    )
    taken = (number < TOP_K) & inside[:, None]
    own = (token * SLOTS)[:, None] + number
    tl.store(chosen + own, expert[None, :], mask=taken)
    tl.store(weight + own, found, mask=taken)
    mine = taken.to(tl.int32)
    count = tl.sum(mine, 0)
    runs = (count > 0).to(tl.int32)
    slot = SHARED + tl.cumsum(runs, 0) - 1  # lanes are in the order of experts
    tl.store(place + slot[None, :] * PLACES + tl.cumsum(mine, 0) - 1, own, mask=taken)
    tl.store(plan + 2 * slot, expert, mask=count > 0)
    tl.store(plan + 2 * slot + 1, count, mask=count > 0)
    for part in tl.static_range(SHARED):
        at = token * SLOTS + TOP_K + part
        tl.store(chosen + at, EXPERTS + part, mask=inside)
        tl.store(weight + at, 1.0, mask=inside)
        tl.store(place + part * PLACES + token, at, mask=inside)
        tl.store(plan + 2 * part, EXPERTS + part)
        tl.store(plan + 2 * part + 1, tokens)
    rest = tl.sum(runs, 0) + tl.arange(0, GROUPS_2 * EACH_2)
    left = rest < tl.minimum(EXPERTS, tokens * TOP_K)
    tl.store(plan + 2 * (SHARED + rest), 0, mask=left)
    tl.store(plan + 2 * (SHARED + rest) + 1, 0, mask=left)
