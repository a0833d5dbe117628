"""The `ort` dialects: ONNX Runtime's own operators where they are faster, plain ONNX elsewhere.

docs/performance.md has the measurement behind each lowering rule that `standard` does not have.
"""

from functools import partial
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.experts.branches import lower_branches
from moec.exporters.onnx.experts.ort import BLOCK, INT8_ACTIVATIONS, lower_fused, lower_quantized
from moec.exporters.onnx.int4.ort import lower_int4_linear, lower_int4_moe
from moec.exporters.onnx.lowering import MICROSOFT, Emitter, Rule, Values, type_of
from moec.exporters.onnx.standard import STANDARD, lower_linear, steps
from moec.graph_builder import ops
from moec.graph_builder.ops.operands import BufferedAttention
from moec.graph_builder.passes.buffers import has_buffers
from moec.graph_builder.roles import ATTENTION_PRODUCTS, Role, place_of
from moec.graph_builder.types import TensorType
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.names import EMBED_WEIGHT
from moec.weights.view import name_of

_INT64 = torch.int64
#: added to the scores of masked keys: finite in float16, and low enough to leave no weight
MASKED = -30000.0


def _buffered_attention(e: Emitter, node: fx.Node, of: BufferedAttention[ir.Value]) -> Values:
    mask = of.mask
    inputs: list[ir.Value | None] = [of.q, of.k, of.v, of.key, of.value, of.last, of.total]
    if mask is not None:
        kind = TensorType(type_of(mask).shape, type_of(of.q).dtype)
        sides = (e.cast(e.constant(np.float32(x)), kind.dtype, f"{x:.0f}") for x in (0, MASKED))
        inputs += [None, None, None, e.op("Where", [mask, *sides], kind, label="bias")]
    return e.ops(
        f"{MICROSOFT}::GroupQueryAttention",
        inputs,
        node.meta["type"],
        num_heads=of.heads,
        kv_num_heads=of.kv_heads,
    )


def _skip_norm(
    e: Emitter, node: fx.Node, x: ir.Value, skip: ir.Value, weight: ir.Value, eps: float
) -> Values:
    normed, total = node.meta["type"]
    weight = e.cast(weight, normed.dtype, "weight")
    mean = TensorType((*normed.shape[:-1], 1), torch.float32)
    first, _, _, last = e.ops(
        f"{MICROSOFT}::SkipSimplifiedLayerNormalization",
        [x, skip, weight],
        (normed, mean, mean, total),
        epsilon=eps,
    )
    return first, last


def _spans_of_mask(e: Emitter, node: fx.Node, mask: ir.Value, ids: ir.Value) -> Values:
    one = TensorType((1,), _INT64)
    count = e.op("Shape", [ids], one, label="count", start=1, end=2)
    total = e.op("Shape", [mask], one, label="mask_total", start=1, end=2)
    before = e.op("Sub", [total, count], one, label="before")
    kind = TensorType((type_of(mask).shape[0], f"{e.name}.before"), _INT64)
    old = e.op("Slice", [mask, e.constant([0]), before, e.constant([1])], kind, label="old")
    past, last, scalar = node.meta["type"]
    seen = e.op("ReduceSum", [old, e.constant([1])], past, label="past", keepdims=0)
    ends = e.op("Add", [seen, count], past, label="ends")
    slot = e.op("Sub", [ends, e.constant(1)], past, label="slot")
    wide = e.op("Squeeze", [total], TensorType((), _INT64), label="wide")
    to = ir.DataType.INT32.value
    return (
        seen,
        e.op("Cast", [slot], last, label="last", to=to),
        e.op("Cast", [wide], scalar, label="total", to=to),
    )


def _columns(e: Emitter, node: fx.Node, x: ir.Value) -> ir.Value:
    out = node.meta["type"]
    shape = e.op("Shape", [x], TensorType((2,), _INT64), label="shape")
    return e.op("Expand", [steps(e, x, 1, "steps"), shape], out)


def _quantized_linear(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None,
    bits: int,
) -> ir.Value:
    out: TensorType = node.meta["type"]
    rows, length = type_of(weight).shape
    stored = e.packed(weight, dtype=name_of(out.dtype), bits=bits, block=BLOCK)
    inputs: list[ir.Value | None] = [x, *stored]
    if bias is not None:
        inputs += [None, None, e.cast(bias, out.dtype, "bias")]
    return e.op(
        f"{MICROSOFT}::MatMulNBits",
        inputs,
        out,
        K=length,
        N=rows,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=INT8_ACTIVATIONS,
    )


def _is_not_quantised(node: fx.Node) -> bool:
    """Whether a linear layer is not quantised: routers and tied heads are not.

    A router is small, and an error there may choose another expert. A tied head shares the weight
    of the embedding, which is not quantised.
    """
    weight = cast(fx.Node, node.args[1]).meta["name"]
    return _role(node) == Role.ROUTER or weight == EMBED_WEIGHT


def _is_sensitive(node: fx.Node) -> bool:
    """Whether a linear layer keeps eight bits: those of attention do, the head, and a join.

    A token reads an eighth of its weights there, but most of the error of four bits comes from
    them.
    """
    return _role(node) in (*ATTENTION_PRODUCTS, Role.HEAD, Role.JOIN)


def _role(node: fx.Node) -> Role:
    return place_of(node, "ONNX Runtime's quantised dialects").role


def check_sizes(spec: ModelSpec, bits: int | None) -> None:
    """Refuse a model whose sizes ONNX Runtime's operators do not support, before the build.

    `bits` are the bits of a quantised weight; None stands for no integer quantisation.

    Raises:
        MoecError: a width is not a multiple of the number that an operator needs.
    """
    text, block = spec.text, BLOCK if bits else 1
    wanted = []
    if has_buffers(text):
        wanted.append(("text.head_dim", text.head_dim, 8, "GroupQueryAttention"))
    if text.experts:
        wanted += [
            ("text.dim", text.dim, block, "QMoE"),
            ("text.experts.hidden", text.experts.hidden, block, "QMoE"),
        ]
    for where, size, multiple, operator in wanted:
        if size % multiple:
            refuse(
                f"{spec.name}: {where}",
                size,
                f"a multiple of {multiple}, which ONNX Runtime's {operator} needs",
                "use --target onnx" if multiple == 8 else "use another --precision",
            )


_ORT_OPERATORS = (
    #    op                      written by
    Rule(ops.buffered_attention, _buffered_attention),
    Rule(ops.skip_norm, _skip_norm),
    Rule(ops.spans_of_mask, _spans_of_mask),
    Rule(ops.columns, _columns),
)

#: the weights stay in the checkpoint
ORT = (
    *_ORT_OPERATORS,
    Rule(ops.moe, lower_branches),
    *STANDARD,
)
#: the weights are packed, in the type of the graph and the layout of the MoE operator
ORT_PACKED = (*_ORT_OPERATORS, Rule(ops.moe, lower_fused), *STANDARD)


def _quantized(bits: int) -> tuple[Rule, ...]:
    return (
        Rule(ops.moe, partial(lower_quantized, bits=bits)),
        Rule(ops.linear, lower_linear, _is_not_quantised),
        Rule(ops.linear, partial(_quantized_linear, bits=8), _is_sensitive),
        Rule(ops.linear, partial(_quantized_linear, bits=bits)),
        *ORT_PACKED,
    )


ORT_INT8, ORT_INT4 = _quantized(8), _quantized(4)
#: the weights are packed, and those of 4-bit integers keep the checkpoint's
ORT_GIVEN = (
    Rule(ops.int4_moe, lower_int4_moe),
    Rule(ops.int4_linear, lower_int4_linear),
    *ORT_PACKED,
)
