"""The `standard` dialect: plain ONNX operators of opset 24, for any runtime that has them.

Each op of the graph has one function here, and the table `STANDARD` at the end lists them. The
functions for experts are in `experts`, those for FP8 in `fp8`, those for 4-bit integers in
`int4.standard`, those for the vision tower in `vision`.
"""

from collections.abc import Callable
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.attention import (
    lower_attention,
    lower_attention_mask,
    lower_clip,
    lower_head_norm,
    lower_rope,
    lower_rope_table,
    lower_scale_queries,
    lower_temperature,
)
from moec.exporters.onnx.experts.branches import lower_separate
from moec.exporters.onnx.experts.function import in_function
from moec.exporters.onnx.experts.loop import lower_moe
from moec.exporters.onnx.experts.routing import lower_ranks, lower_route
from moec.exporters.onnx.experts.sorted import are_many_of_one_type, lower_sorted
from moec.exporters.onnx.fp8 import (
    lower_dequantize,
    lower_fp8_moe,
    lower_quantize,
    lower_token_scale,
)
from moec.exporters.onnx.heads import lower_head_linear, lower_join_parts, lower_take_part
from moec.exporters.onnx.int4.standard import lower_int4_linear, lower_int4_moe
from moec.exporters.onnx.lowering import DTYPES, Emitter, Rule, type_of
from moec.exporters.onnx.vision import (
    lower_fuse,
    lower_patch_rope_table,
    lower_patches,
    lower_pixel_shuffle,
    lower_tile_tokens,
)
from moec.graph_builder import ops
from moec.graph_builder.ops.operands import Fp8Moe
from moec.graph_builder.types import TensorType
from moec.graph_builder.weights import is_list

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


def _to_float32(e: Emitter, node: fx.Node, x: ir.Value) -> ir.Value:
    return e.op("Cast", [x], _result(node), to=DTYPES[_FLOAT].value)


def _is_separate(node: fx.Node) -> bool:
    """Whether FP8 experts have tensors of their own."""
    operands: Fp8Moe[fx.Node] = Fp8Moe(*cast(Any, node.args))
    return is_list(operands.gate_up)


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
    Rule(ops.attention_mask, lower_attention_mask),
    Rule(ops.attention, lower_attention),
    Rule(ops.take_part, lower_take_part),
    Rule(ops.join_parts, lower_join_parts),
    Rule(ops.head_linear, lower_head_linear),
    Rule(ops.head_norm, lower_head_norm),
    Rule(ops.clip, lower_clip),
    Rule(ops.temperature, lower_temperature),
    Rule(ops.scale_queries, lower_scale_queries),
    Rule(ops.rope_table, lower_rope_table),
    Rule(ops.rope, lower_rope),
    Rule(ops.linear, lower_linear),
    Rule(ops.rms_norm, _rms_norm),
    Rule(ops.layer_norm, _layer_norm),
    Rule(ops.add, _add),
    Rule(ops.swiglu, _swiglu),
    Rule(ops.gelu, _gelu),
    Rule(ops.ranks, lower_ranks),
    Rule(ops.route, lower_route),
    Rule(ops.moe, lower_moe),
    Rule(ops.separate_moe, in_function(lower_sorted), are_many_of_one_type),
    Rule(ops.separate_moe, in_function(lower_separate)),
    Rule(ops.token_scale, lower_token_scale),
    Rule(ops.quantize, lower_quantize),
    Rule(ops.dequantize, lower_dequantize),
    Rule(ops.fp8_moe, in_function(lower_fp8_moe), _is_separate),
    Rule(ops.fp8_moe, lower_fp8_moe),
    Rule(ops.int4_linear, lower_int4_linear),
    Rule(ops.int4_moe, lower_int4_moe),
    Rule(ops.to_float32, _to_float32),
    Rule(ops.patches, lower_patches),
    Rule(ops.tile_tokens, lower_tile_tokens),
    Rule(ops.patch_rope_table, lower_patch_rope_table),
    Rule(ops.pixel_shuffle, lower_pixel_shuffle),
)
