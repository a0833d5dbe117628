"""Faults in attention: rotary positions, QK-norm, temperature, heads, masks and caches.

QK-norm ahead of RoPE is not among them: it has no weight, and a rotation keeps the norm of a head.
"""

import numpy as np
from onnx import ModelProto, NodeProto

from tests.planted.edit import (
    Add,
    after,
    attribute_of,
    becomes,
    before,
    computes,
    constant,
    constant_of,
    dims_of,
    node_of,
    rewire,
    set_attribute,
)


def _at(layer: int) -> str:
    return f"layers.{layer}.attn"


def halves(model: ModelProto, layer: int, parts: str = "qk") -> None:
    """Rotate the first half of a head with the second, as Llama's other layout does."""
    for part in parts:
        set_attribute(node_of(model, f"{_at(layer)}.{part}.rope"), "interleaved", 0)


def halves_of_keys(model: ModelProto, layer: int) -> None:
    halves(model, layer, "k")


def sine_negated(model: ModelProto, layer: int) -> None:
    sine = before(model, f"{_at(layer)}.q.rope")("Neg", ["rope.1"])
    for part in "qk":
        rewire(model, f"{_at(layer)}.{part}.rope", "rope.1", sine)


def rope_dropped(model: ModelProto, layer: int, parts: str = "qk") -> None:
    for part in parts:
        name = f"{_at(layer)}.{part}.rope"
        becomes(model, name, "Identity", [node_of(model, name).input[0]])


def rope_of_queries_dropped(model: ModelProto, layer: int) -> None:
    rope_dropped(model, layer, "q")


def rope_twice(model: ModelProto, layer: int) -> None:
    for part in "qk":
        name = f"{_at(layer)}.{part}.rope"
        inner, add = after(model, name)
        _rotate(add, inner, name, attribute_of(node_of(model, inner), "num_heads"))


def rope_in_a_layer_without(model: ModelProto, layer: int) -> None:
    """Rotate the queries and keys of a layer that has no positions."""
    mix = node_of(model, f"{_at(layer)}.mix")
    sizes = {"q": _heads(mix, "q_num_heads"), "k": attribute_of(mix, "kv_num_heads")}
    for part, heads in sizes.items():
        assert not computes(model, f"{_at(layer)}.{part}.rope")
        inner, add = after(model, f"{_at(layer)}.{part}.rows")
        _rotate(add, inner, f"{_at(layer)}.{part}.rows", heads)


def _rotate(add: Add, x: str, name: str, heads: int) -> None:
    add("RotaryEmbedding", [x, "rope.0", "rope.1"], name, interleaved=1, num_heads=heads)


def _heads(mix: NodeProto, name: str) -> int:
    known = {each.name for each in mix.attribute}
    return int(attribute_of(mix, name if name in known else "num_heads"))


def _norm_dropped(model: ModelProto, layer: int, part: str) -> None:
    name = f"{_at(layer)}.{part}.norm"
    becomes(model, name, "Identity", [node_of(model, f"{name}/heads").input[0]])


def norm_of_queries_dropped(model: ModelProto, layer: int) -> None:
    _norm_dropped(model, layer, "q")


def norm_of_keys_dropped(model: ModelProto, layer: int) -> None:
    _norm_dropped(model, layer, "k")


def norm_over_all_heads(model: ModelProto, layer: int) -> None:
    """Norm a query over the heads together, not each head by itself."""
    name = f"{_at(layer)}.q.norm"
    heads, normed = node_of(model, f"{name}/heads"), node_of(model, f"{name}/normed")
    _, _, count, size = constant_of(model, heads.input[1])
    heads.input[1] = constant(model, [0, 0, 1, count * size], np.int64)
    normed.input[1] = constant(model, np.ones(count * size), np.float32)


def temperature_dropped(model: ModelProto, layer: int) -> None:
    name = f"{_at(layer)}.q.temperature"
    becomes(model, name, "Identity", [node_of(model, name).input[0]])


def temperature_in_a_layer_without(model: ModelProto, layer: int) -> None:
    assert not computes(model, f"{_at(layer)}.q.temperature")
    queries = node_of(model, f"{_at(layer)}.mix").input[0]
    inner, add = after(model, queries)
    add("Mul", [inner, "temperature"], queries)


def scale_off(model: ModelProto, layer: int) -> None:
    """Scale the scores by 1 % too much."""
    mix = node_of(model, f"{_at(layer)}.mix")
    width = dims_of(model, f"{_at(layer)}.q.weight")[0]
    head_dim = width // _heads(mix, "q_num_heads")
    set_attribute(mix, "scale", 1.01 * head_dim**-0.5)


def key_heads_in_the_wrong_order(model: ModelProto, layer: int) -> None:
    """Repeat the key heads as 0 1 0 1 for the query heads, not as 0 0 1 1."""
    mix = node_of(model, f"{_at(layer)}.mix")
    if mix.domain:  # GroupQueryAttention repeats them itself: bring the query heads out of order
        count, width = _heads(mix, "num_heads"), dims_of(model, f"{_at(layer)}.q.weight")[0]
        order = np.arange(count).reshape(attribute_of(mix, "kv_num_heads"), -1).T.ravel()
        columns, back = (
            constant(model, np.arange(width).reshape(count, -1)[each].ravel(), np.int64)
            for each in (order, np.argsort(order))
        )
        queries = mix.input[0]
        wrong = before(model, f"{_at(layer)}.mix")("Gather", [queries, columns], axis=2)
        rewire(model, f"{_at(layer)}.mix", queries, wrong)
        inner, add = after(model, f"{_at(layer)}.mix")
        add("Gather", [inner, back], f"{_at(layer)}.mix", axis=2)
        return
    add = before(model, f"{_at(layer)}.mix")
    heads, groups = attribute_of(mix, "q_num_heads"), attribute_of(mix, "kv_num_heads")
    tiled = [add("Concat", [mix.input[i]] * (heads // groups), axis=2) for i in (1, 2)]
    mix = node_of(model, f"{_at(layer)}.mix")
    mix.input[1], mix.input[2] = tiled
    set_attribute(mix, "kv_num_heads", heads)


def columns_of_output_permuted(model: ModelProto, layer: int) -> None:
    """Read the heads in the wrong order in the output product."""
    name = f"{_at(layer)}.o"
    weight = node_of(model, name).input[1]
    width = dims_of(model, f"{name}.weight")[1]
    order = constant(model, np.roll(np.arange(width), 1), np.int64)
    rewire(model, name, weight, before(model, name)("Gather", [weight, order], axis=1))


def rounded_to_half(model: ModelProto, layer: int) -> None:
    """Round the attention output to float16, as a cast that was folded in the wrong order does."""
    name = f"{_at(layer)}.o"
    inner, add = after(model, name)
    add("Cast", [add("Cast", [inner], to=10)], name, to=1)


def residual_dropped(model: ModelProto, layer: int) -> None:
    """Leave the input of the attention block out of its residual sum."""
    name = f"{_at(layer)}.residual"
    node = node_of(model, name)
    if node.op_type == "Add":
        becomes(model, name, "Identity", [node.input[1]])
    else:
        _zero_skipped(model, name)


def _zero_skipped(model: ModelProto, value: str) -> None:
    old = node_of(model, value).input[0]
    zero = constant(model, 0, np.float32)
    rewire(model, value, old, before(model, value)("Mul", [old, zero]))


def residual_after_norm(model: ModelProto, layer: int) -> None:
    """Add the attention to the input after the norm, not to the one before."""
    name = f"{_at(layer)}.residual"
    rewire(model, name, node_of(model, name).input[0], f"{_at(layer)}.norm")


def mask_dropped(model: ModelProto, layer: int) -> None:
    mix = node_of(model, f"{_at(layer)}.mix")
    del mix.input[3:]


def mask_sees_the_next_token(model: ModelProto, layer: int) -> None:
    """Let each query see one key past itself."""
    mask = node_of(model, f"{_at(layer)}.mix").input[3]
    kind = mask.removesuffix(".mask")
    add = before(model, f"{_at(layer)}.mix")
    later = add("Add", ["ring.mask/queries", constant(model, 1, np.int64)])
    wrong = add("LessOrEqual", [f"{kind}.mask/keys", later])
    wrong = add("And", [wrong, f"{kind}.mask/is_token"])
    if kind == "ring":
        wrong = add("And", [wrong, "ring.mask/same_chunk"])
    rewire(model, f"{_at(layer)}.mix", mask, wrong)


def mask_of_the_other_kind(model: ModelProto, layer: int) -> None:
    """Let a chunked layer look past its chunk, in the keys of this call."""
    add = before(model, f"{_at(layer)}.mix")
    wrong = add("And", ["ring.mask/causal", "ring.mask/is_token"])
    rewire(model, f"{_at(layer)}.mix", "ring.mask", wrong)


def values_hold_keys(model: ModelProto, layer: int) -> None:
    """Write the keys into both caches."""
    _, add = after(model, f"present.{layer}.value")
    add("Identity", [f"present.{layer}.key"], f"present.{layer}.value")


def cache_rotated(model: ModelProto, layer: int) -> None:
    """Write each key and value into the slot after its own."""
    axis = 2 if node_of(model, f"{_at(layer)}.mix").domain else 1
    for kind in ("key", "value"):
        name = f"present.{layer}.{kind}"
        inner, add = after(model, name)
        ends = {n: constant(model, [n], np.int64) for n in (-1, 0, 2**62)}
        along = constant(model, [axis], np.int64)
        last = add("Slice", [inner, ends[-1], ends[2**62], along])
        rest = add("Slice", [inner, ends[0], ends[-1], along])
        add("Concat", [last, rest], name, axis=axis)


def window_in_a_global_layer(model: ModelProto, layer: int) -> None:
    set_attribute(node_of(model, f"{_at(layer)}.mix"), "local_window_size", 100)


def scores_capped(model: ModelProto, layer: int) -> None:
    set_attribute(node_of(model, f"{_at(layer)}.mix"), "softcap", 30.0)


def spans_of_the_ring(model: ModelProto, layer: int) -> None:
    """Let a global layer write where a chunked one does."""
    for what in ("last", "total"):
        rewire(model, f"{_at(layer)}.mix", f"global.{what}", f"ring.{what}")
