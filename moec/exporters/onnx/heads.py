"""Parts of heads in plain ONNX, for multi-head latent attention."""

import onnx_ir as ir
from torch import fx

from moec.exporters.onnx.lowering import Emitter, type_of
from moec.graph_builder.types import TensorType


def lower_take_part(
    e: Emitter, node: fx.Node, x: ir.Value, heads: int, start: int, stop: int
) -> ir.Value:
    """`take_part`: a Slice of each head."""
    out: TensorType = node.meta["type"]
    if heads == 1:
        return _slice(e, x, start, stop, len(out.shape) - 1, out, "")
    apart = _apart(e, x, heads, "heads")
    kind = type_of(apart)
    part = kind.like(*kind.shape[:-1], stop - start)
    taken = _slice(e, apart, start, stop, len(kind.shape) - 1, part, "part")
    return _together(e, taken, out)


def lower_join_parts(e: Emitter, node: fx.Node, x: ir.Value, y: ir.Value, heads: int) -> ir.Value:
    """`join_parts`: a Concat of each head."""
    out: TensorType = node.meta["type"]
    if heads == 1:
        return e.op("Concat", [x, y], out, axis=-1)
    both = [_apart(e, each, heads, label) for each, label in ((x, "x"), (y, "y"))]
    kind = type_of(both[0])
    wide = kind.like(*kind.shape[:-1], out.shape[-1] // heads)
    return _together(e, e.op("Concat", both, wide, label="joined", axis=-1), out)


def lower_head_linear(
    e: Emitter,
    node: fx.Node,
    x: ir.Value,
    weight: ir.Value,
    heads: int,
    start: int,
    stop: int,
    out: bool,
) -> ir.Value:
    """`head_linear`: one MatMul, whose batch is the heads."""
    result: TensorType = node.meta["type"]
    rows, columns = type_of(weight).shape
    wide = e.cast(weight, result.dtype, "weight")
    split = result.like(heads, rows // heads, columns)
    shape = e.constant([heads, rows // heads, columns])
    parts = e.op("Reshape", [wide, shape], split, label="weights")
    mine = result.like(heads, stop - start, columns)
    parts = _slice(e, parts, start, stop, 1, mine, "mine")
    if out:
        turned = result.like(heads, columns, stop - start)
        parts = e.op("Transpose", [parts], turned, label="turned", perm=[0, 2, 1])
    apart = _apart(e, x, heads, "heads")  # [B, S, heads, ...]
    batch, tokens, _, size = type_of(apart).shape
    first = result.like(batch, heads, tokens, size)
    by_head = e.op("Transpose", [apart], first, label="by_head", perm=[0, 2, 1, 3])
    width = result.shape[-1] // heads
    product = e.op(
        "MatMul", [by_head, parts], result.like(batch, heads, tokens, width), label="product"
    )
    back = result.like(batch, tokens, heads, width)
    return _together(e, e.op("Transpose", [product], back, label="back", perm=[0, 2, 1, 3]), result)


def _apart(e: Emitter, x: ir.Value, heads: int, label: str) -> ir.Value:
    """x [..., heads * d] as [..., heads, d]."""
    kind = type_of(x)
    *lead, width = kind.shape
    shape = e.constant([*(0 for _ in lead), heads, width // heads])
    return e.op("Reshape", [x, shape], kind.like(*lead, heads, width // heads), label=label)


def _together(e: Emitter, x: ir.Value, out: TensorType) -> ir.Value:
    """x [..., heads, d] as [..., heads * d]."""
    *lead, width = out.shape
    return e.op("Reshape", [x, e.constant([*(0 for _ in lead), width])], out)


def _slice(
    e: Emitter, x: ir.Value, start: int, stop: int, axis: int, out: TensorType, label: str
) -> ir.Value:
    ends = (e.constant([each]) for each in (start, stop, axis))
    return e.op("Slice", [x, *ends], out, label=label)
