"""Experts in ONNX without data-dependent shapes.

Either the graph gathers the weights of each token's experts, or each expert computes all rows, with
zeros in place of the rows of other experts. An expert's output for zeros is zero, so the sum over
the experts is the result.
"""

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.experts.branches import Ffn, choice_of
from moec.exporters.onnx.experts.loop import over_rows, swiglu, zero
from moec.exporters.onnx.lowering import Emitter, type_of
from moec.graph_builder.ops.operands import Moe, Routed
from moec.graph_builder.types import Dim, TensorType

_INT64, _BOOL = torch.int64, torch.bool
#: up to this many rows the weights are gathered, once for each row
FEW = 8


def few_or_many(e: Emitter, node: fx.Node, moe: Moe[ir.Value]) -> ir.Value:
    """`moe`: for few rows only the chosen experts run, for many all of them.

    Which of the two applies follows from shapes, before anything runs.
    """
    gate_up, down = moe.gate_up, moe.down
    count = type_of(gate_up).shape[0]

    def each(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        kind = type_of(scaled)
        size = e.op("Shape", [scaled], TensorType((1,), _INT64), "size", start=0, end=1)
        rows = e.op("Squeeze", [size], TensorType((), _INT64), "count")
        is_few = e.op("LessOrEqual", [rows, e.constant(FEW)], TensorType((), _BOOL), "is_few")
        few, many = e.body("few"), e.body("many")
        own = _gathered(few, scaled, chosen, gate_up, down)
        out = _summed(many, scaled, choice_of(many, chosen, count, kind.dtype), gate_up, down)
        return e.op(
            "If", [is_few], kind, label, then_branch=few.graph([own]), else_branch=many.graph([out])
        )

    return over_rows(e, node, moe, each)


def _gathered(
    e: Emitter, scaled: ir.Value, chosen: ir.Value, gate_up: ir.Value, down: ir.Value
) -> ir.Value:
    """The output of each row's expert for scaled [T, D], on gathered weights."""
    kind = type_of(scaled)
    rows, dim = kind.shape

    def own(fused: ir.Value, label: str) -> ir.Value:
        stored = type_of(fused)
        shape = stored.like(rows, *stored.shape[1:])
        weights = e.op("Gather", [fused, chosen], shape, label, axis=0)
        return e.cast(weights, kind.dtype, f"{label}.cast")

    deep = e.op("Unsqueeze", [scaled, e.constant([1])], kind.like(rows, 1, dim), "x")
    y = _ffn(e, deep, own(gate_up, "gate_up"), own(down, "down"), (rows, 1))
    return e.op("Squeeze", [y, e.constant([1])], kind, "rows")


def _summed(
    e: Emitter, scaled: ir.Value, choice: ir.Value, gate_up: ir.Value, down: ir.Value
) -> ir.Value:
    """All experts' outputs for scaled [T, D], added up; choice [T, E] is 1 at a row's expert."""
    kind = type_of(scaled)
    rows, dim = kind.shape
    count = type_of(choice).shape[1]
    turned = e.op("Transpose", [choice], kind.like(count, rows), "mine", perm=[1, 0])
    column = e.op("Unsqueeze", [turned, e.constant([2])], kind.like(count, rows, 1), "mine.column")
    own = e.op("Mul", [scaled, column], kind.like(count, rows, dim), "own")
    wide = [e.cast(each, kind.dtype, f"{each.name}.cast") for each in (gate_up, down)]
    y = _ffn(e, own, wide[0], wide[1], (count, rows))
    return e.op("ReduceSum", [y, e.constant([0])], kind, "sum", keepdims=0)


def _ffn(
    e: Emitter, x: ir.Value, gate_up: ir.Value, down: ir.Value, lead: tuple[Dim, Dim]
) -> ir.Value:
    """SwiGLU of x [*lead, D] on weights [lead[0], D, 2F] and [lead[0], F, D]."""
    kind, (_, dim, width) = type_of(x), type_of(gate_up).shape
    half = kind.like(*lead, width // 2)
    h = e.op("MatMul", [x, gate_up], kind.like(*lead, width), "h")
    gate, up = e.ops("Split", [h], (half, half), "split", axis=-1, num_outputs=2)
    return e.op("MatMul", [swiglu(e, gate, up), down], kind.like(*lead, dim), "y")


def dense(e: Emitter, node: fx.Node, routed: Routed[ir.Value], count: int, ffn: Ffn) -> ir.Value:
    """All `count` experts for any number of rows: where weights cannot be gathered."""

    def each(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        kind, rows = type_of(scaled), type_of(chosen).shape[0]
        nothing, total = zero(e, kind.dtype), None
        deep = e.op("Unsqueeze", [chosen, e.constant([1])], TensorType((rows, 1), _INT64), "column")
        for i in range(count):
            hits = TensorType((rows, 1), _BOOL)
            hit = e.op("Equal", [deep, e.constant(np.int64(i))], hits, "hit")
            own = e.op("Where", [hit, scaled, nothing], kind, "own")
            run = e.body(f"expert.{i}")
            y = ffn(run, i, own)
            e.nodes.extend(run.nodes)
            operands = [nothing, y] if total is None else [total, y]
            total = e.op("Add", operands, kind, label if i + 1 == count else "sum")
        assert total is not None
        return total

    return over_rows(e, node, routed, each)
