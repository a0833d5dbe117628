"""The `tensorrt` dialect: operators that TensorRT's parser reads with their ONNX meaning.

It differs from `standard` in these points:

    caches        They are buffers of a fixed length, and TensorScatter writes them at consecutive
                  slots. A cache is a ring because the caller wraps the slots, and through the mask.
    attention     It always has an explicit mask, because the parser ignores or misreads is_causal
                  and nonpad_kv_seqlen. The graph scales the queries beforehand.
    experts       TensorRT has no shapes that depend on data. A call with few tokens gathers the
                  weights of the chosen experts; a call with many tokens runs all experts. FP8
                  weights can be neither gathered nor used inside an If, so that all experts run.
                  Where the MoE plugin is used, it runs the chosen experts only.
    FP8           A product of two quantised operands is written in float32, because the parser
                  recognises only that form.
    early fusion  A running count of the image tokens finds the feature of each.
"""

from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.experts.branches import lower_separate
from moec.exporters.onnx.experts.static import dense, few_or_many
from moec.exporters.onnx.fp8 import lower_fp8_moe
from moec.exporters.onnx.lowering import DTYPES, Emitter, Rule, Values, type_of
from moec.exporters.onnx.standard import STANDARD, column, lower_linear, steps
from moec.graph_builder import ops
from moec.graph_builder.ops.operands import BufferedAttention, MoeLayer, arguments
from moec.graph_builder.types import TensorType

#: the domain of TensorRT's own operators: ONNX operators with further attributes
TRT = "trt"
#: the domain of our own operators
MOEC = "moec"
_INT64, _BOOL, _FLOAT = torch.int64, torch.bool, torch.float32


def _buffered_attention(e: Emitter, node: fx.Node, of: BufferedAttention[ir.Value]) -> Values:
    out, *buffers = node.meta["type"]
    batch, count, width = out.shape
    heads, mask = of.heads, of.mask
    assert mask is not None
    first, kept = _first(e, of.last, mask, 2), []
    for buffer, new, kind, label in zip(
        (of.key, of.value), (of.k, of.v), buffers, ("key", "value"), strict=True
    ):
        rows = _by_head(e, new, of.kv_heads, label)
        kept.append(e.op("TensorScatter", [buffer, rows, first], kind, f"{label}.buffer", axis=2))
    queries = _by_head(e, of.q, heads, "q")
    size = width // heads
    mixed = _attend(e, [queries, *kept, mask], size, type_of(queries), "attention")
    turned = out.like(batch, count, heads, width // heads)
    mixed = e.op("Transpose", [mixed], turned, "mixed", perm=[0, 2, 1, 3])
    return e.op("Reshape", [mixed, e.constant([0, 0, width])], out), *kept


def _masks_slots(node: fx.Node) -> bool:
    """Whether the mask covers all slots of the buffer, so that nothing else limits attention."""
    mask = BufferedAttention(*cast(Any, node.args)).mask
    return isinstance(mask, fx.Node) and mask.target == ops.slot_mask.target


def _first(e: Emitter, last: ir.Value, x: ir.Value, axis: int) -> ir.Value:
    """The slot of each sequence's first token in this call, int64 [B].

    `last` holds the slots of the last tokens. The call has as many tokens as x has along `axis`.
    """
    ends = e.cast(last, _INT64, "last")
    size = e.op("Shape", [x], TensorType((1,), _INT64), "size", start=axis, end=axis + 1)
    before = e.op("Sub", [ends, size], type_of(ends), "before")
    return e.op("Add", [before, e.constant([1])], type_of(ends), "first")


def _slot_mask(
    e: Emitter, node: fx.Node, ids: ir.Value, last: ir.Value, buffer: ir.Value
) -> ir.Value:
    """Which of N slots each of S tokens may attend to: those up to its own. bool [B, 1, S, N]."""
    out: TensorType = node.meta["type"]
    batch, _, count, _ = out.shape
    every = steps(e, ids, 1, "steps")
    starts = column(e, _first(e, last, ids, 1), "first.column")
    own = e.op("Add", [starts, every], TensorType((batch, count), _INT64), "own")
    deep = TensorType((batch, 1, count, 1), _INT64)
    rows = e.op("Unsqueeze", [own, e.constant([1, 3])], deep, "own.deep")
    # The slot numbers are computed at run time. As a constant they would make up most of the file
    # for a long context.
    return e.op("LessOrEqual", [steps(e, buffer, 2, "slots"), rows], out)


def _by_head(e: Emitter, x: ir.Value, heads: int, label: str) -> ir.Value:
    """Reshape and transpose x [B, S, heads * d] to [B, heads, S, d]."""
    kind = type_of(x)
    batch, count, width = kind.shape
    size = width // heads
    cut = e.op(
        "Reshape",
        [x, e.constant([0, 0, heads, size])],
        kind.like(batch, count, heads, size),
        f"{label}.heads",
    )
    return e.op(
        "Transpose",
        [cut],
        kind.like(batch, heads, count, size),
        f"{label}.by_head",
        perm=[0, 2, 1, 3],
    )


def _attend(
    e: Emitter, inputs: list[ir.Value], size: int, out: TensorType, label: str, **how: int
) -> ir.Value:
    """Write attention with heads of width `size`. The graph scales the queries beforehand.

    The parser would scale both queries and keys by a square root that it computes in their type. In
    bfloat16 that changes all scores by up to 0.4 %, and rounds both operands. TRT_decomposable lets
    TensorRT replace the operator by simpler ones if it has no kernel for a size or type.
    """
    q, *rest = inputs
    wide = TensorType(out.shape, _FLOAT)
    gain = e.constant(np.float32(size**-0.5))
    scaled = e.op("Mul", [e.cast(q, _FLOAT, "q.float32"), gain], wide, "q.scaled")
    inputs = [e.cast(scaled, out.dtype, "q.rounded"), *rest]
    return e.op(f"{TRT}::Attention", inputs, out, label, TRT_decomposable=1, scale=1.0, **how)


def _attention(
    e: Emitter,
    node: fx.Node,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: None,
    heads: int,
    kv_heads: int,
    scale: None,
) -> ir.Value:
    out: TensorType = node.meta["type"]
    counts = {"q_num_heads": heads, "kv_num_heads": kv_heads}
    return _attend(e, [q, k, v], out.shape[2] // heads, out, "", **counts)


def fuse_by_count(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    ids: ir.Value,
    features: ir.Value,
    token: int,
    given: ir.Value | None = None,
) -> ir.Value:
    """Early fusion: features [N, D] replace the first N rows of x [T, D] whose id is `token`.

    No shape depends on data, so that nobody asks the GPU. `given` is N, if the caller has it.
    """
    out: TensorType = node.meta["type"]
    tokens, dim = out.shape
    flat, flags = TensorType((tokens,), _INT64), TensorType((tokens,), _BOOL)
    row = e.op("Reshape", [ids, e.constant([-1])], flat, "ids")
    hits = e.op("Equal", [row, e.constant(token)], flags, "hits")
    ones = e.cast(hits, _INT64, "ones")
    count = e.op("CumSum", [ones, e.constant(0)], flat, "count")
    rank = e.op("Sub", [count, e.constant(1)], flat, "rank")
    if given is None:
        given = e.op("Shape", [features], TensorType((1,), _INT64), "given", start=0, end=1)
    known = e.op("And", [hits, e.op("Less", [rank, given], flags, "less")], flags, "known")
    # One more row in front, so that Gather has a row even if there are no features.
    blank = e.cast(e.constant(np.zeros((1, dim), np.float32)), out.dtype, "blank")
    more = e.op("Concat", [blank, features], out.like(f"{e.name}.more", dim), "more", axis=0)
    at = e.op("Where", [known, count, e.constant(0)], flat, "at")
    found = e.op("Gather", [more, at], out, "found", axis=0)
    wanted = e.op(
        "Unsqueeze", [known, e.constant([1])], TensorType((tokens, 1), _BOOL), "known.column"
    )
    return e.op("Where", [wanted, found, x], out)


def _linear(
    e: Emitter, node: fx.Node, x: ir.Value, weight: ir.Value, bias: ir.Value | None
) -> ir.Value:
    operands = rounded(x), rounded(weight)
    out: TensorType = node.meta["type"]
    if not all(operands) or out.dtype == _FLOAT:
        return lower_linear(e, node, x, weight, bias)
    # Both operands are FP8. The parser recognises the product of two DequantizeLinear outputs.
    wide = TensorType(out.shape, _FLOAT)
    inputs = [each for each in operands if each is not None]
    if bias is not None:
        inputs.append(e.cast(bias, _FLOAT, "bias"))
    product = e.op("Gemm", inputs, wide, "float32", transB=1)
    return e.op("Cast", [product], out, to=DTYPES[out.dtype].value)


def rounded(x: ir.Value) -> ir.Value | None:
    """The float32 output of DequantizeLinear that a Cast turned into `x`.

    The result is None if x was not made in this way.
    """
    cast = x.producer()
    if cast is None or cast.op_type != "Cast":
        return None
    wide = cast.inputs[0]
    source = wide.producer() if wide is not None else None
    return wide if source is not None and source.op_type == "DequantizeLinear" else None


def _moe_layer(e: Emitter, node: fx.Node, layer: MoeLayer[ir.Value]) -> ir.Value:
    """Write a node for the MoE plugin, which the parser finds by its version and namespace."""
    out: TensorType = node.meta["type"]
    layer = replace(layer, router=e.cast(layer.router, out.dtype, "router"))
    return e.op(
        f"{MOEC}::MoecMoe", arguments(layer), out, plugin_version="1", plugin_namespace=MOEC
    )


TENSORRT = (
    #    op                      written by
    Rule(ops.buffered_attention, _buffered_attention, _masks_slots),
    Rule(ops.slot_mask, _slot_mask),
    Rule(ops.attention, _attention),
    Rule(ops.fuse, fuse_by_count),
    Rule(ops.linear, _linear),
    Rule(ops.moe_layer, _moe_layer),
    Rule(ops.moe, few_or_many),
    Rule(ops.separate_moe, partial(lower_separate, write=dense)),
    Rule(ops.fp8_moe, partial(lower_fp8_moe, write=dense)),
    *STANDARD,
)
