"""The `tensorrt` dialect: operators that TensorRT's parser takes as they are meant.

What differs from `standard`, and why:

    caches      buffers of a fixed length, written by TensorScatter, which is linear: rings are
                rings by where the caller writes, and by the mask
    attention   always with an explicit mask: of is_causal and nonpad_kv_seqlen the parser makes
                something else, or nothing; on queries that are scaled already
    experts     there are no data-dependent shapes: few rows gather the weights of their experts,
                of many all experts run; in FP8, which may be neither gathered nor enter an If,
                always. Or a plugin runs the chosen ones
    FP8         a product of two rounded operands is one in float32, for the parser to see through
    fusion      a running count of image tokens finds each one's feature
"""

from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.fp8 import lower_fp8_moe
from moec.exporters.onnx.lowering import DTYPES, Emitter, Rule, Values, type_of
from moec.exporters.onnx.standard import STANDARD, column, lower_linear, steps
from moec.exporters.onnx.static_experts import dense, few_or_many
from moec.graph_builder import ops
from moec.graph_builder.types import TensorType

#: operators of this domain are TensorRT's own: ONNX's with attributes that ONNX does not know
TRT = "trt"
#: and of this one ours
MOEC = "moec"
_INT64, _BOOL, _FLOAT = torch.int64, torch.bool, torch.float32


def _buffered_attention(
    e: Emitter,
    node: fx.Node,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    key: ir.Value,
    value: ir.Value,
    last: ir.Value,
    total: ir.Value,
    mask: ir.Value | None,
    chunk: int | None,
    heads: int,
    kv_heads: int,
) -> Values:
    out, *buffers = node.meta["type"]
    batch, count, width = out.shape
    assert mask is not None
    first, kept = _first(e, last, mask, 2), []
    for buffer, new, kind, label in zip(
        (key, value), (k, v), buffers, ("key", "value"), strict=True
    ):
        rows = _by_head(e, new, kv_heads, label)
        kept.append(e.op("TensorScatter", [buffer, rows, first], kind, f"{label}.buffer", axis=2))
    queries = _by_head(e, q, heads, "q")
    size = width // heads
    mixed = _attend(e, [queries, *kept, mask], size, type_of(queries), "attention")
    turned = out.like(batch, count, heads, width // heads)
    mixed = e.op("Transpose", [mixed], turned, "mixed", perm=[0, 2, 1, 3])
    return e.op("Reshape", [mixed, e.constant([0, 0, width])], out), *kept


def _masks_slots(node: fx.Node) -> bool:
    """Whether the mask is all that is seen, and not a further limit."""
    mask = node.args[7]
    return isinstance(mask, fx.Node) and mask.target == ops.slot_mask.target


def _first(e: Emitter, last: ir.Value, x: ir.Value, axis: int) -> ir.Value:
    """The slots where a call's tokens start, int64 [B]: it ends at `last`, steps along x's axis."""
    ends = e.cast(last, _INT64, "last")
    size = e.op("Shape", [x], TensorType((1,), _INT64), "size", start=axis, end=axis + 1)
    before = e.op("Sub", [ends, size], type_of(ends), "before")
    return e.op("Add", [before, e.constant([1])], type_of(ends), "first")


def _slot_mask(
    e: Emitter, node: fx.Node, ids: ir.Value, last: ir.Value, buffer: ir.Value
) -> ir.Value:
    """Slots up to a token's own, bool [B, 1, S, N]."""
    out: TensorType = node.meta["type"]
    batch, _, count, _ = out.shape
    every = steps(e, ids, 1, "steps")
    starts = column(e, _first(e, last, ids, 1), "first.column")
    own = e.op("Add", [starts, every], TensorType((batch, count), _INT64), "own")
    deep = TensorType((batch, 1, count, 1), _INT64)
    rows = e.op("Unsqueeze", [own, e.constant([1, 3])], deep, "own.deep")
    # Counted in a run: as a constant, the slots of a long context would be most of the file.
    return e.op("LessOrEqual", [steps(e, buffer, 2, "slots"), rows], out)


def _by_head(e: Emitter, x: ir.Value, heads: int, label: str) -> ir.Value:
    """x [B, S, heads * d] -> [B, heads, S, d]."""
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
    """Attention of heads of `size`, on queries that are scaled before it.

    The parser would scale queries and keys, each by a root that it takes in their own dtype: in
    bfloat16 that is off by up to 0.4 % for all scores alike, and rounds both. Where TensorRT has no
    kernel for a size or dtype, it may take attention apart.
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
) -> ir.Value:
    out: TensorType = node.meta["type"]
    counts = {"q_num_heads": heads, "kv_num_heads": kv_heads}
    return _attend(e, [q, k, v], out.shape[2] // heads, out, "", **counts)


def _fuse(
    e: Emitter, node: fx.Node, x: ir.Value, ids: ir.Value, features: ir.Value, token: int
) -> ir.Value:
    """Features [N, D] instead of the first N rows of x [T, D] whose id is `token`."""
    out: TensorType = node.meta["type"]
    tokens, dim = out.shape
    flat, flags = TensorType((tokens,), _INT64), TensorType((tokens,), _BOOL)
    row = e.op("Reshape", [ids, e.constant([-1])], flat, "ids")
    hits = e.op("Equal", [row, e.constant(token)], flags, "hits")
    ones = e.cast(hits, _INT64, "ones")
    count = e.op("CumSum", [ones, e.constant(0)], flat, "count")
    rank = e.op("Sub", [count, e.constant(1)], flat, "rank")
    given = e.op("Shape", [features], TensorType((1,), _INT64), "given", start=0, end=1)
    known = e.op("And", [hits, e.op("Less", [rank, given], flags, "less")], flags, "known")
    # One row more: there is something to gather from even when there are no features.
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
    # Both are FP8: the parser wants to see the product of what DequantizeLinear gives.
    wide = TensorType(out.shape, _FLOAT)
    inputs = [each for each in operands if each is not None]
    if bias is not None:
        inputs.append(e.cast(bias, _FLOAT, "bias"))
    product = e.op("Gemm", inputs, wide, "float32", transB=1)
    return e.op("Cast", [product], out, to=DTYPES[out.dtype].value)


def rounded(x: ir.Value) -> ir.Value | None:
    """What DequantizeLinear gave, before a Cast to `x`; None if x is no such value."""
    cast = x.producer()
    if cast is None or cast.op_type != "Cast":
        return None
    wide = cast.inputs[0]
    source = wide.producer() if wide is not None else None
    return wide if source is not None and source.op_type == "DequantizeLinear" else None


def _moe_layer(e: Emitter, node: fx.Node, *operands: ir.Value) -> ir.Value:
    """The plugin: its version and namespace are how the parser finds it."""
    x, router, *weights = operands
    out: TensorType = node.meta["type"]
    router = e.cast(router, out.dtype, "router")
    return e.op(
        f"{MOEC}::MoecMoe", [x, router, *weights], out, plugin_version="1", plugin_namespace=MOEC
    )


TENSORRT = (
    #    op                      written by
    Rule(ops.buffered_attention, _buffered_attention, _masks_slots),
    Rule(ops.slot_mask, _slot_mask),
    Rule(ops.attention, _attention),
    Rule(ops.fuse, _fuse),
    Rule(ops.linear, _linear),
    Rule(ops.moe_layer, _moe_layer),
    Rule(ops.moe, few_or_many),
    Rule(ops.fp8_moe, partial(lower_fp8_moe, write=dense)),
    *STANDARD,
)
