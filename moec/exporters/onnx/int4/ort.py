"""4-bit integers of a checkpoint in ONNX Runtime's own operators: MatMulNBits and QMoE.

The operators read the checkpoint's integers, in packed weights: experts joined, gate and up
interleaved. They multiply scales in float32 and do not round the weights to the scales' type.
"""

import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.experts.branches import choice_of
from moec.exporters.onnx.experts.loop import over_rows
from moec.exporters.onnx.experts.ort import ATTRIBUTES
from moec.exporters.onnx.lowering import MICROSOFT, Emitter, Values, type_of, value
from moec.graph_builder.ops.operands import Int4Moe
from moec.graph_builder.types import TensorType
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.mtp.layer import stored_layers
from moec.spec.names import routed
from moec.spec.parameters import parameters
from moec.spec.tensors import quantized
from moec.weights.view import name_of

#: blocks that both operators take, the largest first
BLOCKS = (128, 64, 32, 16)
#: activations stay as they are, as in the model that the integers were made for
FLOAT_ACTIVATIONS = 0


def block_of(group: int) -> int | None:
    """The largest block of the operators that divides a group; None if there is none."""
    return next((block for block in BLOCKS if group % block == 0), None)


def check_int4(spec: ModelSpec) -> None:
    """Refuse 4-bit integers that the operators cannot read.

    Raises:
        MoecError: a group is no multiple of a block, or experts are 4-bit integers only in part.
    """
    if spec.scheme is None or not spec.scheme.int4:
        return
    rules, shapes = quantized(spec), parameters(spec)
    for name, rule in rules.items():
        width = shapes[name][-2 if len(shapes[name]) == 3 else -1]
        group = spec.scheme.block if rule.weight == "group" else width
        if block_of(group) is None:
            refuse(
                f"--target ort: {name}",
                f"groups of {group} inputs",
                f"a multiple of {BLOCKS[-1]}, which MatMulNBits and QMoE need",
                "use --target onnx",
            )
    for layer in stored_layers(spec.text):
        if layer.moe and len(rules.keys() & set(routed(layer.index))) == 1:
            refuse(
                f"--target ort: {' and '.join(routed(layer.index))}",
                "4-bit integers for one of them alone",
                "both or neither, which QMoE needs",
                "use --target onnx",
            )


def lower_int4_linear(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    codes: ir.Value,
    scale: ir.Value,
    zero: ir.Value | None,
    bias: ir.Value | None,
    values: str,
) -> ir.Value:
    """com.microsoft.MatMulNBits."""
    out: TensorType = node.meta["type"]
    rows, columns = type_of(codes).shape[0], 2 * type_of(codes).shape[1]
    group = columns // type_of(scale).shape[1]
    stored = _packed(e, str(codes.name), (rows, columns), group, zero is not None, out.dtype)
    inputs: list[ir.Value | None] = [x, *stored]
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [e.cast(bias, out.dtype, "bias")]
    return e.op(
        f"{MICROSOFT}::MatMulNBits",
        inputs,
        out,
        K=columns,
        N=rows,
        bits=4,
        block_size=block_of(group),
        accuracy_level=FLOAT_ACTIVATIONS,
    )


def lower_int4_moe(e: Emitter, node: fx.Node, moe: Int4Moe[ir.Value]) -> ir.Value:
    """com.microsoft.QMoE."""
    layer = routed(str(moe.down[0].name).split(".")[1])
    dtype, count = type_of(moe.x).dtype, moe.count
    width, dim = (type_of(each[0]).shape[0] for each in (moe.gate_up, moe.down))
    # QMoE has one block for both products.
    groups = [2 * type_of(c[0]).shape[1] // type_of(s[0]).shape[1] for c, s, _ in _both(moe)]
    block = min(block_of(group) or 0 for group in groups)

    def fused(scaled: ir.Value, chosen: ir.Value, label: str) -> ir.Value:
        has_zeros = bool(moe.down_zero)
        stored = [
            _packed(e, name, (count, *shape), group, has_zeros, dtype, arrange, block)
            for name, shape, group, arrange in zip(
                layer, ((dim, 2 * width), (width, dim)), groups, ("interleave", "transpose"),
                strict=True,
            )
        ]  # fmt: skip
        (fc1, scales1, *zeros1), (fc2, scales2, *zeros2) = stored
        choice = choice_of(e, chosen, count, type_of(scaled).dtype)
        inputs: list[ir.Value | None] = [scaled, choice, fc1, scales1, None, fc2, scales2]
        if has_zeros:
            inputs += [None] * (11 - len(inputs)) + [*zeros1, *zeros2]
        return e.op(
            f"{MICROSOFT}::QMoE",
            inputs,
            type_of(scaled),
            label=label,
            **ATTRIBUTES,
            expert_weight_bits=4,
            block_size=block,
            weights_prepacked=0,
            accuracy_level=FLOAT_ACTIVATIONS,
        )

    return over_rows(e, node, moe, fused)


def _both(moe: Int4Moe[ir.Value]) -> list[tuple[list[ir.Value], list[ir.Value], list[ir.Value]]]:
    return [moe.tensors("gate_up"), moe.tensors("down")]


def _packed(
    e: Emitter,
    name: str,
    shape: tuple[int, ...],
    group: int,
    zero_points: bool,
    dtype: torch.dtype,
    arrange: str = "rows",
    block: int | None = None,
) -> Values:
    """The packed tensors of parameter `name`, a linear weight or a stack of experts."""
    parameter = value(name, TensorType(shape, torch.float32))
    how = {"bits": 4, "group": group, "block": block or block_of(group)}
    return e.packed(
        parameter, arrange=arrange, dtype=name_of(dtype), zero_points=zero_points, **how
    )
