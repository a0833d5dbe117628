"""The `standard` dialect: plain ONNX operators of opset 24, for any runtime that has them.

Each op of the graph has one function here, and the table `STANDARD` at the end lists them. The
functions for experts are in `experts`, those for FP8 in `fp8`, those for 4-bit integers in
`int4.standard`, those for the vision tower in `vision`.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.expert_branches import lower_separate
from moec.exporters.onnx.experts import lower_moe
from moec.exporters.onnx.fp8 import (
    lower_dequantize,
    lower_fp8_moe,
    lower_quantize,
    lower_token_scale,
)
from moec.exporters.onnx.int4.standard import lower_int4_linear, lower_int4_moe
from moec.exporters.onnx.lowering import DTYPES, Emitter, Rule, Values, type_of
from moec.exporters.onnx.vision import (
    lower_fuse,
    lower_patch_rope_table,
    lower_patches,
    lower_pixel_shuffle,
    lower_tile_tokens,
)
from moec.graph_builder import ops
from moec.graph_builder.ops.rope import inverse_frequencies
from moec.graph_builder.types import TensorType

OPSET = 24
_Compute = Callable[[ir.Value, TensorType, str], ir.Value]
_INT64, _BOOL, _FLOAT = torch.int64, torch.bool, torch.float32


def _result(node: fx.Node) -> TensorType:
    kind: TensorType = node.meta["type"]
    return kind


def _embedding(e: Emitter, node: fx.Node, ids: ir.Value, table: ir.Value, _: str) -> ir.Value:
    out = _result(node)
    flat = TensorType(out.shape[:1], _INT64)
    packed = e.op("Reshape", [ids, e.constant([-1])], flat, label="ids")
    if type_of(table).dtype == out.dtype:
        return e.op("Gather", [table, packed], out, axis=0)
    # Gather before the Cast, so that only the rows in use are cast.
    stored = TensorType(out.shape, type_of(table).dtype)
    rows = e.op("Gather", [table, packed], stored, label="stored", axis=0)
    return e.op("Cast", [rows], out, to=DTYPES[out.dtype].value)


def column(e: Emitter, x: ir.Value, label: str) -> ir.Value:
    """Reshape x [B] to [B, 1]."""
    kind = type_of(x)
    return e.op("Unsqueeze", [x, e.constant([1])], kind.like(*kind.shape, 1), label=label)


def steps(e: Emitter, x: ir.Value, axis: int, label: str) -> ir.Value:
    """The numbers 0 to N - 1, int64 [N], where N is the size of x along `axis`."""
    size = e.op(
        "Shape", [x], TensorType((1,), _INT64), label=f"{label}.size", start=axis, end=axis + 1
    )
    scalar = e.op("Squeeze", [size], TensorType((), _INT64), label=f"{label}.count")
    count = TensorType((type_of(x).shape[axis],), _INT64)
    return e.op("Range", [e.constant(0), scalar, e.constant(1)], count, label=label)


def _positions(e: Emitter, node: fx.Node, ids: ir.Value, past: ir.Value) -> ir.Value:
    every = steps(e, ids, 1, "steps")
    return e.op("Add", [column(e, past, "past"), every], _result(node))


def _unpack(e: Emitter, node: fx.Node, x: ir.Value, like: ir.Value) -> ir.Value:
    width = type_of(x).shape[1]
    rows = e.op("Shape", [like], TensorType((2,), _INT64), label="rows", start=0, end=2)
    shape = e.op(
        "Concat", [rows, e.constant([width])], TensorType((3,), _INT64), label="shape", axis=0
    )
    return e.op("Reshape", [x, shape], _result(node))


def _pack(e: Emitter, node: fx.Node, x: ir.Value) -> ir.Value:
    return e.op("Reshape", [x, e.constant([-1, type_of(x).shape[2]])], _result(node))


def _gather_rows(e: Emitter, x: ir.Value, index: ir.Value, out: TensorType, label: str) -> ir.Value:
    """Gather rows of x [B, N, W] by index [B, M], whose values count along N, to [B, M, W]."""
    kind = type_of(index)
    deep = e.op("Unsqueeze", [index, e.constant([2])], kind.like(*kind.shape, 1), label="index")
    return e.op("GatherND", [x, deep], out, label=label, batch_dims=1)


def _select(e: Emitter, node: fx.Node, x: ir.Value, index: ir.Value) -> ir.Value:
    kind = type_of(x)
    rows = _gather_rows(e, x, index, kind.like(*type_of(index).shape, kind.shape[2]), "rows")
    return e.op("Reshape", [rows, e.constant([-1, kind.shape[2]])], _result(node))


def _slot_positions(e: Emitter, cache: ir.Value, last: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The position that each slot of a ring cache holds, [B, N], and the slot numbers, [N].

    `last` [B, 1] is the newest position of each sequence. A slot that holds no token gets a
    negative position.
    """
    shape = type_of(cache).shape[:2]
    slots = steps(e, cache, 1, "slots")
    count = e.op("Shape", [cache], TensorType((1,), _INT64), label="count", start=1, end=2)
    # ONNX Runtime refuses a modulo by zero even if there are no elements.
    some = e.op("Max", [count, e.constant([1])], TensorType((1,), _INT64), label="some")
    back = e.op("Sub", [last, slots], TensorType(shape, _INT64), label="back")
    age = e.op("Mod", [back, some], TensorType(shape, _INT64), label="age")
    return e.op("Sub", [last, age], TensorType(shape, _INT64), label="held"), slots


def _key_positions(
    e: Emitter, node: fx.Node, cache: ir.Value, past: ir.Value, positions: ir.Value
) -> ir.Value:
    before = column(e, past, "past")
    last = e.op("Sub", [before, e.constant(1)], type_of(before), label="last")
    held, _ = _slot_positions(e, cache, last)
    # All slots without a token get -1. This keeps them apart from position 0 in runtimes whose
    # integer division truncates.
    known = e.op("Max", [held, e.constant(-1)], type_of(held), label="known")
    return e.op("Concat", [known, positions], _result(node), axis=1)


def _cache_index(
    e: Emitter, node: fx.Node, cache: ir.Value, past: ir.Value, new: ir.Value
) -> ir.Value:
    kind = type_of(past)
    single = kind.like(kind.shape[0], 1)
    total = e.op("Add", [past, new], kind, label="total")
    newest = e.op("Sub", [total, e.constant(1)], kind, label="newest")
    held, slots = _slot_positions(e, cache, column(e, newest, "last"))
    out = _result(node)
    before = e.op("Unsqueeze", [past, e.constant([1])], single, label="past")
    token = e.op("Sub", [held, before], out, label="token")
    fresh = e.op(
        "GreaterOrEqual", [token, e.constant(0)], TensorType(out.shape, _BOOL), label="fresh"
    )
    count = e.op("Shape", [cache], TensorType((1,), _INT64), label="offset", start=1, end=2)
    moved = e.op("Add", [token, count], out, label="moved")
    return e.op("Where", [fresh, moved, slots], out)


def _cache_append(e: Emitter, node: fx.Node, cache: ir.Value, new: ir.Value) -> ir.Value:
    return e.op("Concat", [cache, new], _result(node), axis=1)


def _cache_write(e: Emitter, node: fx.Node, seen: ir.Value, index: ir.Value) -> ir.Value:
    return _gather_rows(e, seen, index, _result(node), "")


def _attention_mask(
    e: Emitter, node: fx.Node, queries: ir.Value, keys: ir.Value, chunk: int | None
) -> ir.Value:
    out = _result(node)
    batch, _, rows, columns = out.shape
    q_kind, k_kind = (
        TensorType((batch, 1, rows, 1), _INT64),
        TensorType((batch, 1, 1, columns), _INT64),
    )
    q = e.op("Unsqueeze", [queries, e.constant([1, 3])], q_kind, label="queries")
    k = e.op("Unsqueeze", [keys, e.constant([1, 2])], k_kind, label="keys")
    is_token = e.op(
        "GreaterOrEqual", [k, e.constant(0)], TensorType(k_kind.shape, _BOOL), label="is_token"
    )
    causal = e.op("LessOrEqual", [k, q], out, label="causal")
    if chunk is None:
        return e.op("And", [causal, is_token], out)
    seen = e.op("And", [causal, is_token], out, label="seen")
    size = e.constant(chunk)
    q_chunk = e.op("Div", [q, size], q_kind, label="query_chunk")
    k_chunk = e.op("Div", [k, size], k_kind, label="key_chunk")
    same = e.op("Equal", [q_chunk, k_chunk], out, label="same_chunk")
    return e.op("And", [seen, same], out)


def _attention(
    e: Emitter,
    node: fx.Node,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value | None,
    *heads: int,
) -> ir.Value:
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    return e.op("Attention", inputs, _result(node), q_num_heads=heads[0], kv_num_heads=heads[1])


def _head_norm(e: Emitter, node: fx.Node, x: ir.Value, heads: int, eps: float) -> ir.Value:
    kind = type_of(x)
    size = kind.shape[2] // heads
    split = kind.like(*kind.shape[:2], heads, size)
    x = e.op("Reshape", [x, e.constant([0, 0, heads, size])], split, label="heads")
    ones = e.cast(e.constant(np.ones(size, np.float32)), kind.dtype, "ones")
    x = e.op("RMSNormalization", [x, ones], split, label="normed", axis=-1, epsilon=eps)
    return e.op("Reshape", [x, e.constant([0, 0, heads * size])], _result(node))


def _temperature(
    e: Emitter, node: fx.Node, positions: ir.Value, floor: int, scale: float
) -> ir.Value:
    flat = TensorType(type_of(positions).shape, _FLOAT)

    def number(x: float) -> ir.Value:
        return e.constant(np.float32(x))

    x = e.op("Add", [e.cast(positions, _FLOAT, "p"), number(1)], flat, label="count")
    x = e.op("Floor", [e.op("Div", [x, number(floor)], flat, label="ratio")], flat, label="steps")
    x = e.op("Log", [e.op("Add", [x, number(1)], flat, label="steps_1")], flat, label="log")
    x = e.op(
        "Add",
        [e.op("Mul", [x, number(scale)], flat, label="gain"), number(1)],
        flat,
        label="factor",
    )
    return e.op("Unsqueeze", [x, e.constant([2])], _result(node))


def _scale_queries(e: Emitter, node: fx.Node, x: ir.Value, factor: ir.Value) -> ir.Value:
    return _in_float32(
        e, node, x, lambda wide, kind, label: e.op("Mul", [wide, factor], kind, label=label)
    )


def _rope_table(
    e: Emitter, node: fx.Node, positions: ir.Value, dim: int, theta: float, scaling: list[float]
) -> Values:
    kind = node.meta["type"][0]
    rates = e.constant(inverse_frequencies(dim, theta, scaling).numpy())
    wide = e.op(
        "Unsqueeze",
        [e.cast(positions, _FLOAT, "p"), e.constant([2])],
        TensorType((*kind.shape[:2], 1), _FLOAT),
        label="columns",
    )
    angles = e.op("Mul", [wide, rates], kind, label="angles")
    return (
        e.op("Cos", [angles], kind, label="cos"),
        e.op("Sin", [angles], kind, label="sin"),
    )


def _rope(
    e: Emitter, node: fx.Node, x: ir.Value, cos: ir.Value, sin: ir.Value, heads: int
) -> ir.Value:
    def rotate(wide: ir.Value, kind: TensorType, label: str) -> ir.Value:
        return e.op(
            "RotaryEmbedding", [wide, cos, sin], kind, label=label, interleaved=1, num_heads=heads
        )

    return _in_float32(e, node, x, rotate)


def _in_float32(e: Emitter, node: fx.Node, x: ir.Value, compute: _Compute) -> ir.Value:
    """Run `compute` on x in float32, and cast the result to the node's own type."""
    out = _result(node)
    kind = TensorType(out.shape, _FLOAT)
    result = compute(e.cast(x, _FLOAT, "wide"), kind, "" if out.dtype == _FLOAT else "float32")
    if out.dtype == _FLOAT:
        return result
    return e.op("Cast", [result], out, to=DTYPES[out.dtype].value)


def lower_linear(
    e: Emitter, node: fx.Node, x: ir.Value, weight: ir.Value, bias: ir.Value | None
) -> ir.Value:
    """Write x [T, K] times weight [N, K], plus bias [N], to [T, N], as one Gemm.

    Gemm takes the weight in the checkpoint's layout.
    """
    out = _result(node)
    weight = e.cast(weight, out.dtype, "weight")
    inputs = [x, weight] if bias is None else [x, weight, e.cast(bias, out.dtype, "bias")]
    return e.op("Gemm", inputs, out, transB=1)


def _rms_norm(e: Emitter, node: fx.Node, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    out = _result(node)
    weight = e.cast(weight, out.dtype, "weight")
    return e.op("RMSNormalization", [x, weight], out, axis=-1, epsilon=eps)


def _layer_norm(
    e: Emitter, node: fx.Node, x: ir.Value, weight: ir.Value, bias: ir.Value, eps: float
) -> ir.Value:
    out = _result(node)
    scale, shift = e.cast(weight, out.dtype, "weight"), e.cast(bias, out.dtype, "bias")
    return e.op("LayerNormalization", [x, scale, shift], out, axis=-1, epsilon=eps)


def _gelu(e: Emitter, node: fx.Node, x: ir.Value) -> ir.Value:
    return e.op("Gelu", [x], _result(node), approximate="none")


def _add(e: Emitter, node: fx.Node, left: ir.Value, right: ir.Value) -> ir.Value:
    return e.op("Add", [left, right], _result(node))


def _swiglu(e: Emitter, node: fx.Node, gate: ir.Value, up: ir.Value) -> ir.Value:
    out = _result(node)
    gain = e.op("Sigmoid", [gate], out, label="sigmoid")
    act = e.op("Mul", [gate, gain], out, label="silu")
    return e.op("Mul", [act, up], out)


def _route(e: Emitter, node: fx.Node, logits: ir.Value, top_k: int) -> Values:
    scores, experts = node.meta["type"]
    # Runtimes have no TopK for bfloat16. In float32 the order is the same.
    if type_of(logits).dtype == torch.bfloat16:
        logits = e.cast(logits, _FLOAT, "logits")
        scores = TensorType(scores.shape, _FLOAT)
    best, chosen = e.ops("TopK", [logits, e.constant([top_k])], (scores, experts), "top", axis=-1)
    wide = e.cast(best, _FLOAT, "wide")
    gain = e.op("Sigmoid", [wide], TensorType(scores.shape, _FLOAT), label="sigmoid")
    return e.cast(gain, node.meta["type"][0].dtype, "scores"), chosen


def _to_float32(e: Emitter, node: fx.Node, x: ir.Value) -> ir.Value:
    return e.op("Cast", [x], _result(node), to=DTYPES[_FLOAT].value)


STANDARD = (
    #    op                     written by
    Rule(ops.embedding, _embedding),
    Rule(ops.fuse, lower_fuse),
    Rule(ops.positions, _positions),
    Rule(ops.unpack, _unpack),
    Rule(ops.pack, _pack),
    Rule(ops.select, _select),
    Rule(ops.key_positions, _key_positions),
    Rule(ops.cache_index, _cache_index),
    Rule(ops.cache_append, _cache_append),
    Rule(ops.cache_write, _cache_write),
    Rule(ops.attention_mask, _attention_mask),
    Rule(ops.attention, _attention),
    Rule(ops.head_norm, _head_norm),
    Rule(ops.temperature, _temperature),
    Rule(ops.scale_queries, _scale_queries),
    Rule(ops.rope_table, _rope_table),
    Rule(ops.rope, _rope),
    Rule(ops.linear, lower_linear),
    Rule(ops.rms_norm, _rms_norm),
    Rule(ops.layer_norm, _layer_norm),
    Rule(ops.add, _add),
    Rule(ops.swiglu, _swiglu),
    Rule(ops.gelu, _gelu),
    Rule(ops.route, _route),
    Rule(ops.moe, lower_moe),
    Rule(ops.separate_moe, lower_separate),
    Rule(ops.token_scale, lower_token_scale),
    Rule(ops.quantize, lower_quantize),
    Rule(ops.dequantize, lower_dequantize),
    Rule(ops.fp8_moe, lower_fp8_moe),
    Rule(ops.int4_linear, lower_int4_linear),
    Rule(ops.int4_moe, lower_int4_moe),
    Rule(ops.to_float32, _to_float32),
    Rule(ops.patches, lower_patches),
    Rule(ops.tile_tokens, lower_tile_tokens),
    Rule(ops.patch_rope_table, lower_patch_rope_table),
    Rule(ops.pixel_shuffle, lower_pixel_shuffle),
)
