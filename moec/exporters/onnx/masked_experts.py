"""Experts without data-dependent shapes: each sees all rows, those of other experts as zeros.

What an expert makes of zeros is zero, so the sum over the experts is the result.
"""

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.expert_branches import Ffn, choice_of
from moec.exporters.onnx.experts import over_rows, zero
from moec.exporters.onnx.lowering import Emitter, type_of
from moec.graph_builder.types import TensorType

_INT64, _BOOL = torch.int64, torch.bool


def conditional(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    scores: ir.Value,
    experts: ir.Value,
    count: int,
    ffn: Ffn,
) -> ir.Value:
    """Each of `count` experts behind an If: those that nobody chose do not run.

    In decode that is all but the chosen. Of a long prompt each chosen expert computes all rows.
    """

    def each(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        kind = type_of(scaled)
        hits = choice_of(e, chosen, count, torch.int32)  # [T, E]
        flags = TensorType((count,), torch.int32)
        most = e.op("ReduceMax", [hits, e.constant([0])], flags, "most", keepdims=0)
        nothing = zero(e, kind.dtype)
        total = e.op("Mul", [scaled, nothing], kind, "start")
        for i in range(count):
            run, skip = e.body(f"expert.{i}"), e.body(f"no_expert.{i}")
            y = ffn(run, i, _own(run, scaled, chosen, i, nothing))
            summed = run.op("Add", [total, y], kind, "sum")
            same = skip.op("Identity", [total], kind, "sum")
            asked = e.op(
                "Gather", [most, e.constant(np.int64(i))], TensorType((), torch.int32), "asked",
                axis=0,
            )  # fmt: skip
            total = e.op(
                "If", [e.cast(asked, _BOOL, "wanted")], kind, label if i + 1 == count else "sum",
                then_branch=run.graph([summed]), else_branch=skip.graph([same]),
            )  # fmt: skip
        return total

    return over_rows(e, node, x, scores, experts, each)


def dense(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    scores: ir.Value,
    experts: ir.Value,
    count: int,
    ffn: Ffn,
) -> ir.Value:
    """All `count` experts, always: where a branch cannot hold their weights."""

    def each(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        kind = type_of(scaled)
        nothing, total = zero(e, kind.dtype), None
        for i in range(count):
            run = e.body(f"expert.{i}")
            y = ffn(run, i, _own(run, scaled, chosen, i, nothing))
            e.nodes.extend(run.nodes)
            last = label if i + 1 == count else "sum"
            total = e.op("Add", [y if total is None else total, nothing if total is None else y],
                         kind, last)  # fmt: skip
        assert total is not None
        return total

    return over_rows(e, node, x, scores, experts, each)


def _own(
    e: Emitter, scaled: ir.Value, chosen: ir.Value, expert: int, nothing: ir.Value
) -> ir.Value:
    """Rows [T, D] of those that chose `expert`, zeros for the rest."""
    rows = type_of(chosen).shape[0]
    column = TensorType((rows, 1), _INT64)
    deep = e.op("Unsqueeze", [chosen, e.constant([1])], column, "column")
    kind = TensorType((rows, 1), _BOOL)
    hit = e.op("Equal", [deep, e.constant(np.int64(expert))], kind, "hit")
    return e.op("Where", [hit, scaled, nothing], type_of(scaled), "own")
