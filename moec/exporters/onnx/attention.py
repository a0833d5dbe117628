"""Attention in plain ONNX: masks, what queries and keys go through, and attention itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.lowering import DTYPES, Emitter, Values, type_of
from moec.graph_builder.ops.rope import inverse_frequencies
from moec.graph_builder.types import TensorType

_Compute = Callable[[ir.Value, TensorType, str], ir.Value]
_INT64, _BOOL, _FLOAT = torch.int64, torch.bool, torch.float32


def _result(node: fx.Node) -> TensorType:
    kind: TensorType = node.meta["type"]
    return kind


def lower_attention_mask(
    e: Emitter,
    node: fx.Node,
    queries: ir.Value,
    keys: ir.Value,
    chunk: int | None,
    window: int | None,
) -> ir.Value:
    """`attention_mask`: comparisons of positions."""
    out = _result(node)
    batch, _, rows, columns = out.shape
    q_kind, k_kind = (
        TensorType((batch, 1, rows, 1), _INT64),
        TensorType((batch, 1, 1, columns), _INT64),
    )
    q = e.op("Unsqueeze", [queries, e.constant([1, 3])], q_kind, label="queries")
    k = e.op("Unsqueeze", [keys, e.constant([1, 2])], k_kind, label="keys")
    is_token = e.op(
        "GreaterOrEqual", [k, e.constant(0)], TensorType(k_kind.shape, _BOOL), label="is_token"
    )
    causal = e.op("LessOrEqual", [k, q], out, label="causal")
    if window is not None:
        back = e.op("Sub", [q, k], TensorType(out.shape, _INT64), label="back")
        near = e.op("Less", [back, e.constant(window)], out, label="near")
        causal = e.op("And", [causal, near], out, label="in_window")
    if chunk is None:
        return e.op("And", [causal, is_token], out)
    seen = e.op("And", [causal, is_token], out, label="seen")
    size = e.constant(chunk)
    q_chunk = e.op("Div", [q, size], q_kind, label="query_chunk")
    k_chunk = e.op("Div", [k, size], k_kind, label="key_chunk")
    same = e.op("Equal", [q_chunk, k_chunk], out, label="same_chunk")
    return e.op("And", [seen, same], out)


def lower_attention(
    e: Emitter,
    node: fx.Node,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value | None,
    heads: int,
    kv_heads: int,
    scale: float | None,
) -> ir.Value:
    """`attention`: one Attention."""
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    how: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": kv_heads}
    if scale:
        how["scale"] = scale
    return e.op("Attention", inputs, _result(node), **how)


def lower_head_norm(
    e: Emitter, node: fx.Node, x: ir.Value, weight: ir.Value | None, heads: int, eps: float
) -> ir.Value:
    """`head_norm`: one RMSNormalization over the elements of each head."""
    kind = type_of(x)
    size = kind.shape[2] // heads
    split = kind.like(*kind.shape[:2], heads, size)
    x = e.op("Reshape", [x, e.constant([0, 0, heads, size])], split, label="heads")
    weight = e.constant(np.ones(size, np.float32)) if weight is None else weight
    gain = e.cast(weight, kind.dtype, "gain")
    x = e.op("RMSNormalization", [x, gain], split, label="normed", axis=-1, epsilon=eps)
    return e.op("Reshape", [x, e.constant([0, 0, heads * size])], _result(node))


def lower_clip(e: Emitter, node: fx.Node, x: ir.Value, largest: float) -> ir.Value:
    """`clip`: one Clip."""
    kind = type_of(x)
    ends = [
        e.cast(e.constant(np.float32(sign * largest)), kind.dtype, f"end.{sign}")
        for sign in (-1, 1)
    ]
    return e.op("Clip", [x, *ends], _result(node))


def lower_temperature(
    e: Emitter, node: fx.Node, positions: ir.Value, floor: int, scale: float
) -> ir.Value:
    """`temperature`, in float32."""
    flat = TensorType(type_of(positions).shape, _FLOAT)

    def number(x: float) -> ir.Value:
        return e.constant(np.float32(x))

    x = e.op("Add", [e.cast(positions, _FLOAT, "p"), number(1)], flat, label="count")
    x = e.op("Floor", [e.op("Div", [x, number(floor)], flat, label="ratio")], flat, label="steps")
    x = e.op("Log", [e.op("Add", [x, number(1)], flat, label="steps_1")], flat, label="log")
    x = e.op(
        "Add",
        [e.op("Mul", [x, number(scale)], flat, label="gain"), number(1)],
        flat,
        label="factor",
    )
    return e.op("Unsqueeze", [x, e.constant([2])], _result(node))


def lower_scale_queries(e: Emitter, node: fx.Node, x: ir.Value, factor: ir.Value) -> ir.Value:
    """`scale_queries`, in float32."""
    return _in_float32(
        e, node, x, lambda wide, kind, label: e.op("Mul", [wide, factor], kind, label=label)
    )


def lower_rope_table(
    e: Emitter,
    node: fx.Node,
    positions: ir.Value,
    dim: int,
    theta: float,
    scaling: str,
    numbers: list[float],
    magnitude: float,
) -> Values:
    """`rope_table`; the frequencies are a constant."""
    kind = node.meta["type"][0]
    rates = e.constant(inverse_frequencies(dim, theta, scaling, numbers).numpy())
    wide = e.op(
        "Unsqueeze",
        [e.cast(positions, _FLOAT, "p"), e.constant([2])],
        TensorType((*kind.shape[:2], 1), _FLOAT),
        label="columns",
    )
    angles = e.op("Mul", [wide, rates], kind, label="angles")
    both = e.op("Cos", [angles], kind, label="cos"), e.op("Sin", [angles], kind, label="sin")
    if magnitude == 1:
        return both
    gain = e.constant(np.float32(magnitude))
    return tuple(
        e.op("Mul", [each, gain], kind, label=f"{label}.scaled")
        for each, label in zip(both, ("cos", "sin"), strict=True)
    )


def lower_rope(
    e: Emitter, node: fx.Node, x: ir.Value, cos: ir.Value, sin: ir.Value, heads: int, pairs: str
) -> ir.Value:
    """`rope`: one RotaryEmbedding, in float32."""
    how = {"interleaved": int(pairs == "adjacent"), "num_heads": heads}

    def rotate(wide: ir.Value, kind: TensorType, label: str) -> ir.Value:
        return e.op("RotaryEmbedding", [wide, cos, sin], kind, label=label, **how)

    return _in_float32(e, node, x, rotate)


def _in_float32(e: Emitter, node: fx.Node, x: ir.Value, compute: _Compute) -> ir.Value:
    """Run `compute` on x in float32, and cast the result to the node's own type."""
    out = _result(node)
    kind = TensorType(out.shape, _FLOAT)
    result = compute(e.cast(x, _FLOAT, "wide"), kind, "" if out.dtype == _FLOAT else "float32")
    if out.dtype == _FLOAT:
        return result
    return e.op("Cast", [result], out, to=DTYPES[out.dtype].value)
