"""Experts for ONNX Runtime: its own MoE operators, or every expert written out on its own bytes."""

from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.experts import (
    expert_ffn,
    loop_over_chosen,
    one_expert,
    over_rows,
    rows_of,
    take_rows,
    zero,
)
from moec.exporters.onnx.lowering import MICROSOFT, Emitter, dtype_name, type_of
from moec.graph_builder.types import TensorType

_INT64 = torch.int64
#: up to so many experts each has an If of its own; more are found by a tree of them
FEW = 32
#: elements of a row that share a scale
BLOCK = 64
#: MatMulNBits and QMoE quantise activations to int8 and multiply in int8
INT8_ACTIVATIONS = 4


def are_few(node: fx.Node) -> bool:
    """Whether a question for each expert costs less than finding the chosen ones."""
    gate_up = cast(fx.Node, node.args[3])
    return bool(gate_up.meta["type"].shape[0] <= FEW)


def lower_guarded(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    scores: ir.Value,
    experts: ir.Value,
    gate_up: ir.Value,
    down: ir.Value,
) -> ir.Value:
    """Each expert behind an If: the rows that chose it, on its slice of the checkpoint's bytes."""
    count = type_of(gate_up).shape[0]

    def each(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        kind = type_of(scaled)
        choice = _choice(e, chosen, count, torch.int32)
        most = e.op(
            "ReduceMax", [choice, e.constant([0])], TensorType((count,), torch.int32),
            label="most", keepdims=0,
        )  # fmt: skip
        wanted = e.op(
            "Cast", [most], TensorType((count,), torch.bool), label="wanted",
            to=ir.DataType.BOOL.value,
        )  # fmt: skip
        total = e.op("Mul", [scaled, zero(e, kind.dtype)], kind, label="start")
        for i in range(count):
            run, skip = e.body(f"expert.{i}"), e.body(f"no_expert.{i}")
            fc1, fc2 = (run.expert(fused, i, kind.dtype) for fused in (gate_up, down))
            filled = one_expert(run, scaled, chosen, e.constant(i), fc1, fc2, total, "sum")
            same = skip.op("Identity", [total], kind, label="sum")
            asked = e.op(
                "Gather", [wanted, e.constant(i)], TensorType((), torch.bool), label="asked", axis=0
            )
            total = e.op(
                "If", [asked], kind, label=label if i + 1 == count else "sum",
                then_branch=run.graph([filled]), else_branch=skip.graph([same]),
            )  # fmt: skip
        return total

    return over_rows(e, node, x, scores, experts, each)


def lower_tree(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    scores: ir.Value,
    experts: ir.Value,
    gate_up: ir.Value,
    down: ir.Value,
) -> ir.Value:
    """A loop over the chosen experts; a tree of Ifs finds each one's slice of the bytes."""

    def ffn(e: Emitter, rows: ir.Value, expert: ir.Value, low: int, high: int) -> ir.Value:
        """The output of `expert`, one of low to high - 1, for its rows [t, D]."""
        kind = type_of(rows)
        if high - low == 1:
            return expert_ffn(e, rows, *(e.expert(w, low, kind.dtype) for w in (gate_up, down)))
        middle = (low + high) // 2
        left, right = e.body(f"{low}-{middle - 1}"), e.body(f"{middle}-{high - 1}")
        below = e.op(
            "Less", [expert, e.constant(middle)], TensorType((), torch.bool), label="below"
        )
        branches = (
            left.graph([ffn(left, rows, expert, low, middle)]),
            right.graph([ffn(right, rows, expert, middle, high)]),
        )
        return e.op(
            "If", [below], kind, label="y", then_branch=branches[0], else_branch=branches[1]
        )

    def loop(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        count = type_of(gate_up).shape[0]

        def one(e: Emitter, expert: ir.Value, total: ir.Value) -> ir.Value:
            rows = rows_of(e, chosen, expert)
            y = ffn(e, take_rows(e, scaled, rows), expert, 0, count)
            return e.op("ScatterND", [total, rows, y], type_of(total), label="sum")

        return loop_over_chosen(e, scaled, chosen, label, one)

    return over_rows(e, node, x, scores, experts, loop)


def lower_fused(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    scores: ir.Value,
    experts: ir.Value,
    gate_up: ir.Value,
    down: ir.Value,
) -> ir.Value:
    """com.microsoft.MoE. Gate and up are interleaved: its other layout is wrong on CUDA."""
    count, dtype = type_of(gate_up).shape[0], dtype_name(type_of(x).dtype)

    def fused(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        (fc1,) = e.packed(gate_up, arrange="interleave", dtype=dtype)
        (fc2,) = e.packed(down, arrange="transpose", dtype=dtype)
        return e.op(
            f"{MICROSOFT}::MoE",
            [scaled, _choice(e, chosen, count, type_of(scaled).dtype), fc1, None, fc2],
            type_of(scaled), label=label, k=1, normalize_routing_weights=1,
            activation_type="swiglu", swiglu_fusion=1,
        )  # fmt: skip

    return over_rows(e, node, x, scores, experts, fused)


def lower_quantized(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    scores: ir.Value,
    experts: ir.Value,
    gate_up: ir.Value,
    down: ir.Value,
    bits: int,
) -> ir.Value:
    """com.microsoft.QMoE on experts of `bits`, quantised in blocks along their inputs."""
    count, dtype = type_of(gate_up).shape[0], dtype_name(type_of(x).dtype)

    def fused(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        how = {"dtype": dtype, "bits": bits, "block": BLOCK}
        fc1, scales1 = e.packed(gate_up, arrange="interleave", **how)
        fc2, scales2 = e.packed(down, arrange="transpose", **how)
        choice = _choice(e, chosen, count, type_of(scaled).dtype)
        return e.op(
            f"{MICROSOFT}::QMoE", [scaled, choice, fc1, scales1, None, fc2, scales2],
            type_of(scaled), label=label, k=1, normalize_routing_weights=1,
            activation_type="swiglu", swiglu_fusion=1, expert_weight_bits=bits, block_size=BLOCK,
            weights_prepacked=0, accuracy_level=INT8_ACTIVATIONS,
        )  # fmt: skip

    return over_rows(e, node, x, scores, experts, fused)


def _choice(e: Emitter, chosen: ir.Value, count: int, dtype: torch.dtype) -> ir.Value:
    """One row of router logits for each [T] of `chosen`: 1 at its expert, 0 elsewhere, [T, E].

    The operators take the largest and normalise its weight to 1. So a tie falls as in `route`.
    """
    rows = type_of(chosen).shape[0]
    column = TensorType((rows, 1), _INT64)
    deep = e.op("Unsqueeze", [chosen, e.constant([1])], column, label="choice.column")
    every = e.constant(np.arange(count))
    kind = TensorType((rows, count), torch.bool)
    return e.cast(e.op("Equal", [deep, every], kind, label="choice.hits"), dtype, "choice")
