"""Experts in ONNX Runtime's own MoE operators, on weights in the layout of those operators."""

import onnx_ir as ir
from torch import fx

from moec.exporters.onnx.experts.branches import choice_of
from moec.exporters.onnx.experts.loop import over_rows
from moec.exporters.onnx.lowering import MICROSOFT, Emitter, type_of
from moec.graph_builder.ops.operands import Moe
from moec.weights.view import name_of

#: how many elements of a row share a scale
BLOCK = 64
#: MatMulNBits and QMoE quantise activations to int8 and multiply in int8
INT8_ACTIVATIONS = 4

#: the attributes that MoE and QMoE share: one expert for a token, its score on the input
ATTRIBUTES = {
    "k": 1,
    "normalize_routing_weights": 1,
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
}


def lower_fused(e: Emitter, node: fx.Node, moe: Moe[ir.Value]) -> ir.Value:
    """com.microsoft.MoE. Gate and up are interleaved: its other layout gives wrong sums on CUDA."""
    count, dtype = type_of(moe.gate_up).shape[0], name_of(type_of(moe.x).dtype)

    def fused(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        (fc1,) = e.packed(moe.gate_up, arrange="interleave", dtype=dtype)
        (fc2,) = e.packed(moe.down, arrange="transpose", dtype=dtype)
        return e.op(
            f"{MICROSOFT}::MoE",
            [scaled, choice_of(e, chosen, count, type_of(scaled).dtype), fc1, None, fc2],
            type_of(scaled),
            label=label,
            **ATTRIBUTES,
        )

    return over_rows(e, node, moe, fused)


def lower_quantized(e: Emitter, node: fx.Node, moe: Moe[ir.Value], bits: int) -> ir.Value:
    """com.microsoft.QMoE on experts of `bits` bits, quantised in blocks along their inputs."""
    count, dtype = type_of(moe.gate_up).shape[0], name_of(type_of(moe.x).dtype)

    def fused(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        how = {"dtype": dtype, "bits": bits, "block": BLOCK}
        fc1, scales1 = e.packed(moe.gate_up, arrange="interleave", **how)
        fc2, scales2 = e.packed(moe.down, arrange="transpose", **how)
        choice = choice_of(e, chosen, count, type_of(scaled).dtype)
        return e.op(
            f"{MICROSOFT}::QMoE",
            [scaled, choice, fc1, scales1, None, fc2, scales2],
            type_of(scaled),
            label=label,
            **ATTRIBUTES,
            expert_weight_bits=bits,
            block_size=BLOCK,
            weights_prepacked=0,
            accuracy_level=INT8_ACTIVATIONS,
        )

    return over_rows(e, node, moe, fused)
