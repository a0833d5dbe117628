"""Faults that are not in one layer: positions, masks and caches of all, embedding, head, images."""

import numpy as np
from onnx import ModelProto

from tests.planted.edit import (
    after,
    becomes,
    before,
    constant,
    constant_of,
    dims_of,
    node_of,
    rewire,
)


def theta_off(model: ModelProto, _: None) -> None:
    """Take another base of the frequencies: 490,000 in place of 500,000."""
    rates = node_of(model, "rope/angles").input[1]
    found = constant_of(model, rates)
    exponents = np.arange(len(found)) / len(found)
    wrong = constant(model, found * (500 / 490) ** exponents, np.float32)
    rewire(model, "rope/angles", rates, wrong)


def positions_clipped(model: ModelProto, _: None) -> None:
    """Take no position past 400 for rotary positions and temperature."""
    least = before(model, "rope/p")("Min", ["positions", constant(model, 400, np.int64)])
    rewire(model, "rope/p", "positions", least)


def past_ignored(model: ModelProto, _: None) -> None:
    """Count the positions of each call from 0."""
    own = before(model, "rope/p")("Sub", ["positions", "positions/past"])
    rewire(model, "rope/p", "positions", own)


def temperature_floor_off(model: ModelProto, _: None) -> None:
    floor = node_of(model, "temperature/ratio").input[1]
    wrong = constant(model, constant_of(model, floor) + 1, np.float32)
    rewire(model, "temperature/ratio", floor, wrong)


def temperature_without_floor(model: ModelProto, _: None) -> None:
    becomes(model, "temperature/steps", "Identity", ["temperature/ratio"])


def chunk_border_off(model: ModelProto, _: None) -> None:
    """Begin each chunk a token early."""
    for side, values in (("query", "ring.mask/queries"), ("key", "ring.mask/keys")):
        name = f"ring.mask/{side}_chunk"
        one = constant(model, 1, np.int64)
        rewire(model, name, values, before(model, name)("Add", [values, one]))


def empty_slots_seen(model: ModelProto, _: None) -> None:
    """Take slots without a token for slots with the token at position 0."""
    for kind in ("ring", "global"):
        known = node_of(model, f"{kind}.key_positions/known")
        known.input[1] = constant(model, 0, np.int64)


def lengths_ignored(model: ModelProto, _: None) -> None:
    """Write padding into the caches as if all sequences of a call were of one length."""
    rewire(model, "ring.index/total", "lengths", "positions/steps.size")


def logit_index_ignored(model: ModelProto, _: None) -> None:
    """Return the logits of the first token that was asked for, again and again."""
    zero, one = (constant(model, [n], np.int64) for n in (0, 1))
    inner, add = after(model, "selected/index")
    first = add("Slice", [inner, zero, one, one])
    add("Expand", [first, add("Shape", [inner])], "selected/index")


def embedding_row_scaled(model: ModelProto, _: None) -> None:
    """Scale the embedding of one token by 1.01."""
    inner, add = after(model, "embed")
    hit = add("Equal", ["embed/ids", constant(model, 77, np.int64)])
    gain = add("Where", [hit, *(constant(model, x, np.float32) for x in (1.01, 1))])
    deep = add("Unsqueeze", [gain, constant(model, [1], np.int64)])
    add("Mul", [inner, deep], "embed")


def logit_biased(model: ModelProto, _: None) -> None:
    """Add 0.001 to the logit of one token."""
    bias = np.zeros(dims_of(model, "head.weight")[0])
    bias[99] = 1e-3
    node_of(model, "head").input.append(constant(model, bias, np.float32))


def head_row_replaced(model: ModelProto, _: None) -> None:
    """Take the row of token 100 for token 101."""
    weight = node_of(model, "head").input[1]
    order = np.arange(dims_of(model, "head.weight")[0])
    order[101] = 100
    wrong = before(model, "head")("Gather", [weight, constant(model, order, np.int64)], axis=0)
    rewire(model, "head", weight, wrong)


def images_dropped(model: ModelProto, _: None) -> None:
    becomes(model, "fused", "Identity", ["embed"])


def images_shifted(model: ModelProto, _: None) -> None:
    """Write each image feature a token too late; past the last token, at the first."""
    inner, add = after(model, "fused/at")
    later = add("Add", [inner, constant(model, 1, np.int64)])
    count = add("Shape", ["embed/ids"])
    add("Mod", [later, count], "fused/at")


def images_reversed(model: ModelProto, _: None) -> None:
    """Write the first feature where the last belongs."""
    inner, add = after(model, "fused/at")
    last, first = constant(model, [-1], np.int64), constant(model, [-(2**62)], np.int64)
    zero = constant(model, [0], np.int64)
    add("Slice", [inner, last, first, zero, last], "fused/at")
