"""Experts in plain ONNX: a loop over the experts that this call's tokens chose, and no others.

The loop body is written once however many experts there are, so that a model with 24 x 128 of them
stays as small as one with 16, and it gathers one expert's slab of the fused tensor at a time: in
decode one routed expert per layer is read, cast and multiplied, straight from the mapped shard.
"""

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.lowering import Emitter, type_of, value
from moec.graph_builder.types import TensorType, times

_INT64, _BOOL = torch.int64, torch.bool


def lower_moe(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    scores: ir.Value,
    experts: ir.Value,
    gate_up: ir.Value,
    down: ir.Value,
) -> ir.Value:
    """x [T, D], scores and experts [T, k] -> [T, D]; loop row t*k + j is token t's j-th expert."""
    out: TensorType = node.meta["type"]
    tokens, dim = out.shape
    top_k = type_of(scores).shape[1]
    rows = times(tokens, top_k) if top_k > 1 else tokens

    scaled = _scale(e, x, scores, out.like(rows, dim), top_k)
    chosen = e.op(
        "Reshape", [experts, e.constant([-1])], TensorType((rows,), _INT64), label="chosen"
    )
    active_kind = TensorType((f"{e.name}.active",), _INT64)
    active = e.op("Unique", [chosen], active_kind, label="active", sorted=1)
    size = e.op("Shape", [active], TensorType((1,), _INT64), label="count", start=0, end=1)
    trips = e.op("Squeeze", [size], TensorType((), _INT64), label="trips")
    start = e.op("Mul", [scaled, _zero(e, out.dtype)], out.like(rows, dim), label="start")
    body = _body(e.body("expert"), scaled, chosen, active, gate_up, down)
    if top_k == 1:
        return e.op("Loop", [trips, None, start], out, body=body)
    done = e.op("Loop", [trips, None, start], out.like(rows, dim), label="loop", body=body)
    split = e.op(
        "Reshape", [done, e.constant([-1, top_k, dim])], out.like(tokens, top_k, dim), label="split"
    )
    return e.op("ReduceSum", [split, e.constant([1])], out, keepdims=0)


def _scale(e: Emitter, x: ir.Value, scores: ir.Value, kind: TensorType, top_k: int) -> ir.Value:
    if top_k == 1:
        return e.op("Mul", [x, scores], kind, label="scaled")
    tokens, dim = type_of(x).shape
    wide = e.op("Unsqueeze", [x, e.constant([1])], kind.like(tokens, 1, dim), label="wide")
    deep = e.op("Unsqueeze", [scores, e.constant([2])], kind.like(tokens, top_k, 1), label="deep")
    each = e.op("Mul", [wide, deep], kind.like(tokens, top_k, dim), label="each")
    return e.op("Reshape", [each, e.constant([-1, dim])], kind, label="scaled")


def _zero(e: Emitter, dtype: torch.dtype) -> ir.Value:
    return e.cast(e.constant(np.float32(0)), dtype, "zero")


def _body(
    e: Emitter,
    scaled: ir.Value,
    chosen: ir.Value,
    active: ir.Value,
    gate_up: ir.Value,
    down: ir.Value,
) -> ir.Graph:
    """One expert: gather its tokens and weights, SwiGLU, scatter the result to the tokens' rows."""
    kind, stored = type_of(scaled), type_of(gate_up).dtype
    _, dim, width = type_of(gate_up).shape
    mine = f"{e.name}.tokens"
    step = value(f"{e.name}/step", TensorType((), _INT64))
    go_on = value(f"{e.name}/go_on", TensorType((), _BOOL))
    sum_in = value(f"{e.name}/sum_in", kind)

    expert = e.op("Gather", [active, step], TensorType((), _INT64), label="id", axis=0)
    hits = e.op("Equal", [chosen, expert], TensorType(type_of(chosen).shape, _BOOL), label="hits")
    across = e.op("NonZero", [hits], TensorType((1, mine), _INT64), label="across")
    rows = e.op("Transpose", [across], TensorType((mine, 1), _INT64), label="rows", perm=[1, 0])
    x = e.op("GatherND", [scaled, rows], kind.like(mine, dim), label="x")

    def slab(fused: ir.Value, label: str, *shape: int) -> ir.Value:
        one = e.op("Gather", [fused, expert], TensorType(shape, stored), label=label, axis=0)
        return e.cast(one, kind.dtype, f"{label}.cast")

    half = kind.like(mine, width // 2)
    h = e.op("MatMul", [x, slab(gate_up, "gate_up", dim, width)], kind.like(mine, width), label="h")
    gate, up = e.ops("Split", [h], (half, half), "split", axis=-1, num_outputs=2)
    gain = e.op("Sigmoid", [gate], half, label="sigmoid")
    act = e.op("Mul", [e.op("Mul", [gate, gain], half, label="silu"), up], half, label="act")
    y = e.op("MatMul", [act, slab(down, "down", width // 2, dim)], kind.like(mine, dim), label="y")
    sum_out = e.op("ScatterND", [sum_in, rows, y], kind, label="sum")
    stay = e.op("Identity", [go_on], TensorType((), _BOOL), label="stay")
    return ir.Graph([step, go_on, sum_in], [stay, sum_out], nodes=e.nodes, name="expert")
