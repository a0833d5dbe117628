"""Experts for ONNX Runtime: its own MoE operators, or every expert written out on its own bytes."""

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.experts import one_expert, over_rows, zero
from moec.exporters.onnx.lowering import MICROSOFT, Emitter, dtype_name, type_of
from moec.graph_builder.types import TensorType

_INT64 = torch.int64
#: experts that are written out at most: each costs a dozen nodes a layer
UNROLLED = 32
#: elements of a row that share a scale
BLOCK = 32
#: MatMulNBits and QMoE quantise activations to int8 and multiply in int8
INT8_ACTIVATIONS = 4


def unrolls(node: fx.Node) -> bool:
    """Whether experts can be written out: few, and stored in the dtype that the graph computes in.

    Cast experts would all be cast at every step.
    """
    x, gate_up = node.args[0].meta["type"], node.args[3].meta["type"]
    return bool(gate_up.shape[0] <= UNROLLED and gate_up.dtype == x.dtype)


def lower_unrolled(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    scores: ir.Value,
    experts: ir.Value,
    gate_up: ir.Value,
    down: ir.Value,
) -> ir.Value:
    """Every expert on the rows that chose it, its weights a slice of the checkpoint's tensor."""

    def each(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        kind = type_of(scaled)
        total = e.op("Mul", [scaled, zero(e, kind.dtype)], kind, label="start")
        count = type_of(gate_up).shape[0]
        for i in range(count):
            weights = (e.weights.slice(fused, i) for fused in (gate_up, down))
            name = f"sum.{i}" if i + 1 < count else label
            total = one_expert(e, scaled, chosen, e.constant(i), *weights, total, name)
        return total

    return over_rows(e, node, x, scores, experts, each)


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
    hits = e.op("Equal", [deep, every], TensorType((rows, count), torch.bool), label="choice.hits")
    return e.cast(hits, dtype, "choice")
