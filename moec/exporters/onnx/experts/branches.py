"""Experts in plain ONNX, a branch for each expert, which runs only if a token chose the expert.

A few experts stand one after the other, each in an If. Many are the leaves of a tree of Ifs, in a
loop over the chosen ones. Either way an expert's weights are a slice of the file, which no operator
copies.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.experts.loop import (
    expert_ffn,
    loop_over_chosen,
    over_rows,
    rows_of,
    swiglu,
    take_rows,
    zero,
)
from moec.exporters.onnx.lowering import Emitter, type_of
from moec.graph_builder.ops.operands import Moe, Routed, SeparateMoe
from moec.graph_builder.types import TensorType

_INT64 = torch.int64
#: up to this many experts each has an If of its own; more are found by a tree of Ifs
FEW = 32

#: what an expert, given by its number, makes of its rows [t, D]: written by the branch's emitter
Ffn = Callable[[Emitter, int, ir.Value], ir.Value]


def lower_branches(
    e: Emitter, node: fx.Node, moe: Moe[ir.Value], write: Callable[..., ir.Value] | None = None
) -> ir.Value:
    """`moe` on weights in the checkpoint; `write` is `branches` or another way to write experts."""

    def ffn(e: Emitter, expert: int, rows: ir.Value) -> ir.Value:
        dtype = type_of(rows).dtype
        weights = (e.expert(fused, expert, dtype) for fused in (moe.gate_up, moe.down))
        return expert_ffn(e, rows, *weights)

    return (write or branches)(e, node, moe, type_of(moe.gate_up).shape[0], ffn)


def lower_separate(
    e: Emitter,
    node: fx.Node,
    moe: SeparateMoe[ir.Value],
    write: Callable[..., ir.Value] | None = None,
) -> ir.Value:
    """`separate_moe` on weights in the checkpoint; `write` as in `lower_branches`."""

    def ffn(e: Emitter, expert: int, rows: ir.Value) -> ir.Value:
        kind = type_of(rows)

        def product(x: ir.Value, weight: ir.Value, label: str) -> ir.Value:
            out = kind.like(kind.shape[0], type_of(weight).shape[0])
            wide = e.cast(weight, kind.dtype, f"{weight.name}.cast")
            return e.op("Gemm", [x, wide], out, label, transB=1)

        gate, up = moe.gate_up[2 * expert :][:2]
        act = swiglu(e, product(rows, gate, "gate"), product(rows, up, "up"))
        return product(act, moe.down[expert], "down")

    return (write or branches)(e, node, moe, moe.count, ffn)


def branches(e: Emitter, node: fx.Node, routed: Routed[ir.Value], count: int, ffn: Ffn) -> ir.Value:
    """A branch for each of `count` experts: up to FEW an If for each costs less than a tree."""
    return (guarded if count <= FEW else tree)(e, node, routed, count, ffn)


def guarded(e: Emitter, node: fx.Node, routed: Routed[ir.Value], count: int, ffn: Ffn) -> ir.Value:
    """An If for each of `count` experts, which computes the rows that chose it."""

    def each(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        kind = type_of(scaled)
        choice = choice_of(e, chosen, count, torch.int32)
        most = e.op(
            "ReduceMax",
            [choice, e.constant([0])],
            TensorType((count,), torch.int32),
            label="most",
            keepdims=0,
        )
        wanted = e.op(
            "Cast",
            [most],
            TensorType((count,), torch.bool),
            label="wanted",
            to=ir.DataType.BOOL.value,
        )
        total = e.op("Mul", [scaled, zero(e, kind.dtype)], kind, label="start")
        for i in range(count):
            run, skip = e.body(f"expert.{i}"), e.body(f"no_expert.{i}")
            rows = rows_of(run, chosen, e.constant(i))
            y = ffn(run, i, take_rows(run, scaled, rows))
            filled = run.op("ScatterND", [total, rows, y], kind, label="sum")
            same = skip.op("Identity", [total], kind, label="sum")
            asked = e.op(
                "Gather", [wanted, e.constant(i)], TensorType((), torch.bool), label="asked", axis=0
            )
            total = e.op(
                "If",
                [asked],
                kind,
                label=label if i + 1 == count else "sum",
                then_branch=run.graph([filled]),
                else_branch=skip.graph([same]),
            )
        return total

    return over_rows(e, node, routed, each)


def tree(e: Emitter, node: fx.Node, routed: Routed[ir.Value], count: int, ffn: Ffn) -> ir.Value:
    """A loop over the chosen ones of `count` experts; a tree of Ifs finds the branch of each."""

    def branch(e: Emitter, rows: ir.Value, expert: ir.Value, low: int, high: int) -> ir.Value:
        """The output of `expert`, which is from low to high - 1, for its rows [t, D]."""
        kind = type_of(rows)
        if high - low == 1:
            return ffn(e, low, rows)
        middle = (low + high) // 2
        left, right = e.body(f"{low}-{middle - 1}"), e.body(f"{middle}-{high - 1}")
        below = e.op(
            "Less", [expert, e.constant(middle)], TensorType((), torch.bool), label="below"
        )
        branches = (
            left.graph([branch(left, rows, expert, low, middle)]),
            right.graph([branch(right, rows, expert, middle, high)]),
        )
        return e.op(
            "If", [below], kind, label="y", then_branch=branches[0], else_branch=branches[1]
        )

    def loop(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        def one(e: Emitter, expert: ir.Value, total: ir.Value) -> ir.Value:
            rows = rows_of(e, chosen, expert)
            y = branch(e, take_rows(e, scaled, rows), expert, 0, count)
            return e.op("ScatterND", [total, rows, y], type_of(total), label="sum")

        return loop_over_chosen(e, scaled, chosen, label, one)

    return over_rows(e, node, routed, loop)


def choice_of(e: Emitter, chosen: ir.Value, count: int, dtype: torch.dtype) -> ir.Value:
    """Router logits [T, E] that make an operator choose chosen [T]: 1 at its expert, 0 elsewhere.

    The operator takes the largest logit and normalises its weight to 1. So ties are decided as
    `route` decided them.
    """
    rows = type_of(chosen).shape[0]
    column = TensorType((rows, 1), _INT64)
    deep = e.op("Unsqueeze", [chosen, e.constant([1])], column, label="choice.column")
    every = e.constant(np.arange(count))
    kind = TensorType((rows, count), torch.bool)
    return e.cast(e.op("Equal", [deep, every], kind, label="choice.hits"), dtype, "choice")
