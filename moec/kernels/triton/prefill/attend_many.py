"""Causal attention of many tokens per sequence over buffers of keys and values, in Triton.

A program attends from ROWS tokens of one head to KEYS slots at a time. It keeps the largest score
of each token, the sum of its weights and the weighted sum of values, all in registers (flash
attention). Most tiles lie before the program's first token and need no mask.
"""

import triton
import triton.language as tl


@triton.jit
def _mix(
    queries, key, value, place, at, slot, own, end, largest, total, mixed,
    SCALE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to the tile at slot `at`: the largest score, sum of weights and sum of values.

    With MASKED a token sees no slot after its `own`, and slots from `end` on are not read.
    """
    if MASKED:
        filled = (at + slot < end)[:, None]
        k = tl.load(key + place, mask=filled, other=0.0)
        v = tl.load(value + place, mask=filled, other=0.0)
    else:
        k, v = tl.load(key + place), tl.load(value + place)
    scores = tl.dot(queries, tl.trans(k))
    if MASKED:
        scores = tl.where(at + slot[None, :] <= own[:, None], scores, float("-inf"))
    higher = tl.maximum(largest, tl.max(scores, 1) * SCALE)
    base = higher
    if MASKED:  # a token that has seen no slot yet
        base = tl.where(higher == float("-inf"), 0.0, higher)
    fade = tl.exp2(largest - base)
    weight = tl.exp2(scores * SCALE - base[:, None])
    total = total * fade + tl.sum(weight, 1)
    mixed = tl.dot(weight.to(tl.bfloat16), v, mixed * fade[:, None])
    return higher, total, mixed


@triton.jit(do_not_specialize=["steps", "slots"])
def attend_many(
    q,
    key,
    value,
    last,
    out,
    steps,
    slots,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Token i of `steps` sits at slot last - steps + 1 + i, and attends to slots 0 to its own.

    Grid (HEADS, steps / ROWS, batch). The last tokens, which see most, come first: so the programs
    that start last are short. GROUP heads read the same keys, one after the other, from L2.

    q and out bf16 [batch, steps, HEADS * SIZE]; key and value bf16 [batch, HEADS / GROUP, slots,
    SIZE]. SCALE is that of the scores, times the base-2 logarithm of e. A token with a negative
    slot gets zeros. What is in slots after `last` does not matter.
    """
    head, row = tl.program_id(0), tl.program_id(2)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    token, slot, size = block * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, SIZE)
    inside = token[:, None] < steps
    newest = tl.load(last + row)
    own = newest - steps + 1 + token
    first = newest - steps + 1 + block * ROWS
    end = tl.minimum(first + ROWS, newest + 1)
    full = tl.maximum(first + 1, 0) // KEYS * KEYS  # every token sees all slots before
    width: tl.constexpr = HEADS * SIZE
    at_q = (row.to(tl.int64) * steps + token[:, None]) * width + head * SIZE + size[None, :]
    queries = tl.load(q + at_q, mask=inside, other=0.0)
    start = (row * (HEADS // GROUP) + head // GROUP).to(tl.int64) * slots * SIZE
    key += start
    value += start
    place = slot[:, None] * SIZE + size[None, :]
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, SIZE), tl.float32)
    for at in range(0, full, KEYS):
        largest, total, mixed = _mix(
            queries, key, value, place + at * SIZE, at, slot, own, end, largest, total, mixed,
            SCALE, False,
        )  # fmt: skip
    for at in range(full, end, KEYS):
        largest, total, mixed = _mix(
            queries, key, value, place + at * SIZE, at, slot, own, end, largest, total, mixed,
            SCALE, True,
        )  # fmt: skip
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + at_q, mixed.to(tl.bfloat16), mask=inside)
