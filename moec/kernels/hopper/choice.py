"""How a router chooses the experts of one token, in Gluon: by the order of its logits.

The names of constants are those of `moec.spec.parts.routing.Routing`. The launch `choose` makes all
other choices, CHOSEN says. These functions know no groups of experts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

#: added to the sum that scores are divided by, as in `moec.kernels.triton.choice`
SMALLEST_SUM = gl.constexpr(1e-20)


@gluon.jit
def best(logits, EXPERTS: gl.constexpr, EXPERTS_2: gl.constexpr, TOP_K: gl.constexpr, LAID):
    """The TOP_K best experts and their logits, as tuples; and all logits, rounded to bf16.

    They are compared as integers in the same order, as in `moec.kernels.triton.choice`.
    """
    expert = gl.arange(0, EXPERTS_2, LAID)
    row = gl.load(logits + expert, mask=expert < EXPERTS, other=float("-inf"), cache_modifier=".cg")
    row = row.to(gl.bfloat16).to(gl.float32) + 0.0  # -0.0 equals 0.0
    bits = row.to(gl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = (bits & -0x10000) | (EXPERTS_2 - 1 - expert)
    experts = ()
    found = ()
    for _ in gl.static_range(TOP_K):
        most = gl.max(bits, 0)
        experts = experts + (EXPERTS_2 - 1 - (most & 0xFFFF),)
        logit = (most ^ ((most >> 31) & 0x7FFFFFFF)) & -0x10000
        found = found + (logit.to(gl.float32, bitcast=True),)
        bits = gl.where(bits == most, -0x80000000, bits)
    return experts, found, row


@gluon.jit
def weights_of(found, row, SCORE: gl.constexpr, NORMALISE: gl.constexpr, FACTOR: gl.constexpr):
    """The weights of the chosen experts, from their logits `found` and all logits `row`."""
    TOP_K: gl.constexpr = len(found)
    most = found[0]
    every = gl.sum(gl.exp(row - most), 0)
    scores = ()
    total = 0.0
    for i in gl.static_range(TOP_K):
        if SCORE == "sigmoid":
            score = 1 / (1 + gl.exp(-found[i]))
        elif SCORE == "softmax":
            score = gl.exp(found[i] - most) / every
        else:
            score = gl.exp(found[i] - most)
        scores = scores + (score,)
        total += score
    weights = ()
    for i in gl.static_range(TOP_K):
        score = scores[i]
        if SCORE == "softmax_of_chosen":
            score = score / total
        if NORMALISE:
            whole = 1.0 if SCORE == "softmax_of_chosen" else total
            score = score / (whole + SMALLEST_SUM)
        weights = weights + ((score * FACTOR).to(gl.bfloat16).to(gl.float32),)
    return weights


@gluon.jit
def slots_of(
    chosen,
    given,
    logits,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    TOP_K: gl.constexpr,
    SHARED: gl.constexpr,
    SCORE: gl.constexpr,
    NORMALISE: gl.constexpr,
    FACTOR: gl.constexpr,
    CHOSEN: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The experts of all slots, the shared ones last, and their weights, as tuples."""
    experts = ()
    weights = ()
    if CHOSEN:
        for slot in gl.static_range(TOP_K):  # not older values from L1
            experts = experts + (gl.load(chosen + slot, cache_modifier=".cg"),)
            weights = weights + (gl.load(given + slot, cache_modifier=".cg"),)
    else:
        LAID: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        experts, found, row = best(logits, EXPERTS, EXPERTS_2, TOP_K, LAID)
        weights = weights_of(found, row, SCORE, NORMALISE, FACTOR)
    for i in gl.static_range(SHARED):
        experts = experts + (EXPERTS + i,)
        weights = weights + (1.0,)
    return experts, weights


@gluon.jit
def expert_of(
    slot,
    chosen,
    logits,
    EXPERTS: gl.constexpr,
    EXPERTS_2: gl.constexpr,
    TOP_K: gl.constexpr,
    CHOSEN: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The expert of a slot; the shared ones are the last."""
    if CHOSEN:
        expert = gl.load(chosen + slot, cache_modifier=".cg")
    else:
        LAID: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        experts, _, _ = best(logits, EXPERTS, EXPERTS_2, TOP_K, LAID)
        expert = EXPERTS + slot - TOP_K
        for i in gl.static_range(TOP_K):
            expert = gl.where(slot == i, experts[i], expert)
    return expert
