"""Experts in plain ONNX without branches: rows in the order of their experts, and a product each.

An expert that no row chose has a product of no rows. A runtime returns from it at once and reads no
weight, which takes less time than a branch. A cast of a weight would run for idle experts too, so
this is for weights in the type of the products.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.experts.branches import FEW, choice_of
from moec.exporters.onnx.experts.loop import over_rows, swiglu
from moec.exporters.onnx.lowering import Emitter, type_of
from moec.graph_builder.ops.operands import SeparateMoe
from moec.graph_builder.types import TensorType
from moec.graph_builder.weights import weights_of

_INT64, _BOOL = torch.int64, torch.bool
#: ONNX Runtime prepacks, and so copies, constants of a product's own graph and of the one around it
DEPTH = 2

Write = Callable[[Emitter, str], ir.Value]


def are_many_of_one_type(node: fx.Node) -> bool:
    """Whether more than FEW experts have weights in the type of their rows."""
    moe: SeparateMoe[fx.Node] = SeparateMoe(*cast(Any, node.args))
    gate_up, down = (weights_of(cast(fx.Node, each)) for each in (moe.gate_up, moe.down))
    kinds = {kind.dtype for kind in (*gate_up.values(), *down.values())}
    return len(down) > FEW and kinds == {moe.x.meta["type"].dtype}


def lower_sorted(e: Emitter, node: fx.Node, moe: SeparateMoe[ir.Value]) -> ir.Value:
    """`separate_moe` as one product of each weight with the rows of its expert."""

    def each(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        size = e.op("Size", [chosen], TensorType((), _INT64), "size")
        some = e.op("Greater", [size, e.constant(0)], TensorType((), _BOOL), "some")

        def write(inner: Emitter, name: str) -> ir.Value:
            return _products(inner, moe, scaled, chosen, name)

        return _below(e, DEPTH, some, scaled, label, write)

    return over_rows(e, node, moe, each)


def _below(
    e: Emitter, depth: int, some: ir.Value, empty: ir.Value, label: str, write: Write
) -> ir.Value:
    """What `write` makes, below `depth` Ifs: without rows, it is `empty`."""
    if not depth:
        return write(e, label)
    kind, run, skip = type_of(empty), e.body("some"), e.body("none")
    found = _below(run, depth - 1, some, empty, "rows", write)
    same = skip.op("Identity", [empty], kind, "rows")
    return e.op(
        "If", [some], kind, label, then_branch=run.graph([found]), else_branch=skip.graph([same])
    )


def _products(
    e: Emitter, moe: SeparateMoe[ir.Value], scaled: ir.Value, chosen: ir.Value, label: str
) -> ir.Value:
    """The output of each row's expert, for scaled [T, D] and chosen [T]."""
    kind, flat = type_of(scaled), type_of(chosen)
    count = e.op("Shape", [chosen], TensorType((1,), _INT64), "count")
    _, order = e.ops("TopK", [chosen, count], (flat, flat), "order", axis=0, largest=0)
    _, places = e.ops("TopK", [order, count], (flat, flat), "places", axis=0, largest=0)
    choice = choice_of(e, chosen, moe.count, _INT64)
    counts = e.op(
        "ReduceSum", [choice, e.constant([0])], TensorType((moe.count,), _INT64), "counts",
        keepdims=0,
    )  # fmt: skip
    x = _split(e, e.op("Gather", [scaled, order], kind, "x", axis=0), counts, moe.count, "x.own")
    gate, up = (
        _joined(e, x, moe.gate_up[half::2], flat, name) for half, name in enumerate(("gate", "up"))
    )
    act = _split(e, swiglu(e, gate, up), counts, moe.count, "act.own")
    down = _joined(e, act, moe.down, flat, "down")
    return e.op("Gather", [down, places], kind, label, axis=0)


def _split(
    e: Emitter, rows: ir.Value, counts: ir.Value, experts: int, label: str
) -> Sequence[ir.Value]:
    """`rows`, in the order of their experts, apart for each."""
    kind = type_of(rows)
    own = [kind.like(f"{e.name}.rows.{i}", kind.shape[1]) for i in range(experts)]
    return e.ops("Split", [rows, counts], own, label, axis=0)


def _joined(
    e: Emitter, own: Sequence[ir.Value], weights: Sequence[ir.Value], flat: TensorType, label: str
) -> ir.Value:
    """The products of each expert's rows with its weight [out, in], in one tensor."""
    kind, width = type_of(own[0]), type_of(weights[0]).shape[0]
    products = [
        e.op("Gemm", [x, weight], kind.like(type_of(x).shape[0], width), f"{label}.own", transB=1)
        for x, weight in zip(own, weights, strict=True)
    ]
    return e.op("Concat", products, kind.like(*flat.shape, width), label, axis=0)
