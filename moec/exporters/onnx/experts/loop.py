"""Experts in plain ONNX: a loop over the experts that this call's tokens chose.

The body of the loop is written once, for any number of experts. So a model with 24 x 128 experts
stays as small as one with 16. The body gathers one expert's slice of the fused tensor at a time: in
decode each layer reads, casts and multiplies one routed expert, straight from the mapped shard.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.lowering import Emitter, type_of, value
from moec.graph_builder.ops.operands import Moe, Routed
from moec.graph_builder.types import TensorType, times

_INT64, _BOOL = torch.int64, torch.bool
#: what experts make of rows, the expert of each row, and the label of the result
Compute = Callable[[ir.Value, ir.Value, str], ir.Value]
#: what one expert adds: written by the loop body's emitter, for an expert and the rows so far
OneExpert = Callable[[Emitter, ir.Value, ir.Value], ir.Value]


def lower_moe(e: Emitter, node: fx.Node, moe: Moe[ir.Value]) -> ir.Value:
    """`moe` as a Loop over the chosen experts."""

    def loop(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        dtype = type_of(scaled).dtype

        def one(e: Emitter, expert: ir.Value, total: ir.Value) -> ir.Value:
            def weight(fused: ir.Value, label: str) -> ir.Value:
                kind = type_of(fused)
                shape = kind.like(*kind.shape[1:])
                one = e.op("Gather", [fused, expert], shape, label=label, axis=0)
                return e.cast(one, dtype, f"{label}.cast")

            weights = weight(moe.gate_up, "gate_up"), weight(moe.down, "down")
            return one_expert(e, scaled, chosen, expert, *weights, total, "sum")

        return loop_over_chosen(e, scaled, chosen, label, one)

    return over_rows(e, node, moe, loop)


def loop_over_chosen(
    e: Emitter, scaled: ir.Value, chosen: ir.Value, label: str, one: OneExpert
) -> ir.Value:
    """For each row of scaled [T, D] the output of its expert, of chosen [T]: [T, D].

    The loop's body calls `one`, which fills in the rows of one expert.
    """
    kind = type_of(scaled)
    active_kind = TensorType((f"{e.name}.active",), _INT64)
    active = e.op("Unique", [chosen], active_kind, label="active", sorted=1)
    size = e.op("Shape", [active], TensorType((1,), _INT64), label="count", start=0, end=1)
    trips = e.op("Squeeze", [size], TensorType((), _INT64), label="trips")
    start = e.op("Mul", [scaled, zero(e, kind.dtype)], kind, label="start")

    inner = e.body("expert")
    step = value(f"{inner.name}/step", TensorType((), _INT64))
    go_on = value(f"{inner.name}/go_on", TensorType((), _BOOL))
    total = value(f"{inner.name}/total", kind)
    expert = inner.op("Gather", [active, step], TensorType((), _INT64), label="id", axis=0)
    filled = one(inner, expert, total)
    stay = inner.op("Identity", [go_on], TensorType((), _BOOL), label="stay")
    body = inner.graph([stay, filled], [step, go_on, total])
    return e.op("Loop", [trips, None, start], kind, label=label, body=body)


def over_rows(e: Emitter, node: fx.Node, routed: Routed[ir.Value], compute: Compute) -> ir.Value:
    """The sum over each token's k weighed experts, [T, D].

    `compute` gets one row for each token and expert, [T * k, D], already multiplied by its score
    where scores multiply inputs; the expert of each row, [T * k]; and the label of its result. Row
    t * k + j belongs to the j-th expert of token t.
    """
    out: TensorType = node.meta["type"]
    tokens, dim = out.shape
    top_k = type_of(routed.scores).shape[1]
    rows = times(tokens, top_k) if top_k > 1 else tokens
    flat = TensorType((rows,), _INT64)
    chosen = e.op("Reshape", [routed.experts, e.constant([-1])], flat, label="chosen")
    on_input = routed.weighed == "input"
    if top_k == 1:
        if on_input:
            scaled = e.op("Mul", [routed.x, routed.scores], out, label="scaled")
            return compute(scaled, chosen, "")
        return e.op("Mul", [compute(routed.x, chosen, "rows"), routed.scores], out)
    wide = out.like(tokens, top_k, dim)
    deep = e.op(
        "Unsqueeze", [routed.scores, e.constant([2])], out.like(tokens, top_k, 1), label="deep"
    )
    x = e.op("Unsqueeze", [routed.x, e.constant([1])], out.like(tokens, 1, dim), label="wide")
    if on_input:
        each = e.op("Mul", [x, deep], wide, label="each")
    else:
        each = e.op("Expand", [x, e.constant([1, top_k, 1])], wide, label="each")
    scaled = e.op("Reshape", [each, e.constant([-1, dim])], out.like(rows, dim), label="scaled")
    done = compute(scaled, chosen, "rows")
    split = e.op("Reshape", [done, e.constant([-1, top_k, dim])], wide, label="split")
    if not on_input:
        split = e.op("Mul", [split, deep], wide, label="weighed")
    return e.op("ReduceSum", [split, e.constant([1])], out, keepdims=0)


def zero(e: Emitter, dtype: torch.dtype) -> ir.Value:
    """The scalar 0 in `dtype`."""
    return e.cast(e.constant(np.float32(0)), dtype, "zero")


def one_expert(
    e: Emitter,
    scaled: ir.Value,
    chosen: ir.Value,
    expert: ir.Value,
    gate_up: ir.Value,
    down: ir.Value,
    total: ir.Value,
    label: str,
) -> ir.Value:
    """`total` with the rows of one expert filled in, whose weights are [D, 2F] and [F, D]."""
    rows = rows_of(e, chosen, expert)
    y = expert_ffn(e, take_rows(e, scaled, rows), gate_up, down)
    return e.op("ScatterND", [total, rows, y], type_of(scaled), label=label)


def rows_of(e: Emitter, chosen: ir.Value, expert: ir.Value) -> ir.Value:
    """Where chosen [T] is `expert`: indices [t, 1], as GatherND and ScatterND take them."""
    mine = f"{e.name}.tokens"
    hits = e.op("Equal", [chosen, expert], TensorType(type_of(chosen).shape, _BOOL), label="hits")
    across = e.op("NonZero", [hits], TensorType((1, mine), _INT64), label="across")
    return e.op("Transpose", [across], TensorType((mine, 1), _INT64), label="rows", perm=[1, 0])


def take_rows(e: Emitter, x: ir.Value, rows: ir.Value) -> ir.Value:
    """The rows of x [T, D] at indices [t, 1]: [t, D]."""
    kind = type_of(x)
    return e.op("GatherND", [x, rows], kind.like(type_of(rows).shape[0], kind.shape[1]), label="x")


def expert_ffn(e: Emitter, x: ir.Value, gate_up: ir.Value, down: ir.Value) -> ir.Value:
    """SwiGLU of one expert: x [t, D], gate_up [D, 2F], down [F, D] -> [t, D]."""
    kind, (dim, width) = type_of(x), type_of(gate_up).shape
    mine = kind.shape[0]
    half = kind.like(mine, width // 2)
    h = e.op("MatMul", [x, gate_up], kind.like(mine, width), label="h")
    gate, up = e.ops("Split", [h], (half, half), "split", axis=-1, num_outputs=2)
    return e.op("MatMul", [swiglu(e, gate, up), down], kind.like(mine, dim), label="y")


def swiglu(e: Emitter, gate: ir.Value, up: ir.Value) -> ir.Value:
    """silu(gate) * up."""
    kind = type_of(gate)
    gain = e.op("Sigmoid", [gate], kind, label="sigmoid")
    return e.op("Mul", [e.op("Mul", [gate, gain], kind, label="silu"), up], kind, label="act")
