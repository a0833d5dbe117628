"""Routing in plain ONNX: how a router's logits choose experts and weigh them."""

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.lowering import Emitter, Values, type_of
from moec.graph_builder.ops.moe import SMALLEST_SUM
from moec.graph_builder.ops.operands import Ranks, Route
from moec.graph_builder.types import TensorType

_INT64, _BOOL, _FLOAT = torch.int64, torch.bool, torch.float32


def lower_route(e: Emitter, node: fx.Node, route: Route[ir.Value]) -> Values:
    """`route`; weights are computed in float32."""
    weights, experts = node.meta["type"]
    kind = TensorType(weights.shape, _FLOAT)
    best, order = TensorType(weights.shape, type_of(route.ranks).dtype), route.ranks
    # Runtimes have no TopK for bfloat16. In float32 the order is the same.
    if best.dtype == torch.bfloat16:
        order, best = e.cast(order, _FLOAT, "ranks"), kind
    count = e.constant([route.top_k])
    top, chosen = e.ops("TopK", [order, count], (best, experts), "top", axis=-1)
    if route.score == "softmax":
        logits = e.cast(route.logits, _FLOAT, "logits")
        every = _softmax(e, logits, TensorType(type_of(logits).shape, _FLOAT))
        found = e.op("GatherElements", [every, chosen], kind, label="gain", axis=1)
    else:
        if route.ranks is not route.logits:
            mine = TensorType(weights.shape, type_of(route.logits).dtype)
            top = e.op("GatherElements", [route.logits, chosen], mine, label="own", axis=1)
        sigmoid = _exact_sigmoid if route.normalise else _sigmoid
        scores_of = sigmoid if route.score == "sigmoid" else _softmax
        found = scores_of(e, e.cast(top, _FLOAT, "wide"), kind)
    if route.normalise:
        column = TensorType((kind.shape[0], 1), _FLOAT)
        total = e.op("ReduceSum", [found, e.constant([1])], column, label="total", keepdims=1)
        above = e.op("Add", [total, e.constant(np.float32(SMALLEST_SUM))], column, label="above")
        found = e.op("Div", [found, above], kind, label="normalised")
    if route.factor != 1:
        found = e.op("Mul", [found, e.constant(np.float32(route.factor))], kind, label="times")
    return e.cast(found, weights.dtype, "scores"), chosen


def _softmax(e: Emitter, logits: ir.Value, kind: TensorType) -> ir.Value:
    return e.op("Softmax", [logits], kind, label="softmax", axis=-1)


def _sigmoid(e: Emitter, logits: ir.Value, kind: TensorType) -> ir.Value:
    return e.op("Sigmoid", [logits], kind, label="sigmoid")


def _exact_sigmoid(e: Emitter, logits: ir.Value, kind: TensorType) -> ir.Value:
    """1 / (1 + exp(-x)), right to a few bits of each score.

    ONNX Runtime's Sigmoid is right to 1e-8 in all on a CPU. So small scores are off, 2e-4 of them
    at -8, and zero below -18. Scores that are divided by their sum, or compared, need each.
    """
    one = e.constant(np.float32(1))
    below = e.op("Exp", [e.op("Neg", [logits], kind, label="minus")], kind, label="exp")
    return e.op("Div", [one, e.op("Add", [below, one], kind, label="plus")], kind, label="sigmoid")


def lower_ranks(e: Emitter, node: fx.Node, ranks: Ranks[ir.Value]) -> ir.Value:
    """`ranks`, in float32."""
    every = TensorType(type_of(ranks.logits).shape, _FLOAT)
    scores_of = _exact_sigmoid if ranks.score == "sigmoid" else _softmax
    scores = scores_of(e, e.cast(ranks.logits, _FLOAT, "logits"), every)
    if ranks.bias is not None:
        bias = e.cast(ranks.bias, _FLOAT, "bias")
        scores = e.op("Add", [scores, bias], every, label="biased")
    groups, kept = ranks.groups, ranks.kept_groups
    if groups == 1:
        return e.op("Identity", [scores], every)
    tokens, count = every.shape
    split = TensorType((tokens, groups, count // groups), _FLOAT)
    shape = e.constant([-1, groups, count // groups])
    apart = e.op("Reshape", [scores, shape], split, label="groups")
    two = TensorType((tokens, groups, 2), _FLOAT)
    places = TensorType(two.shape, _INT64)
    best, _ = e.ops("TopK", [apart, e.constant([2])], (two, places), "best_two", axis=-1)
    flat = TensorType((tokens, groups), _FLOAT)
    value = e.op("ReduceSum", [best, e.constant([2])], flat, label="group", keepdims=0)
    some = (TensorType((tokens, kept), _FLOAT), TensorType((tokens, kept), _INT64))
    _, chosen = e.ops("TopK", [value, e.constant([kept])], some, "groups_kept", axis=-1)
    deep = e.op(
        "Unsqueeze", [chosen, e.constant([2])], TensorType((tokens, kept, 1), _INT64), label="deep"
    )
    hits = TensorType((tokens, kept, groups), _BOOL)
    equal = e.op("Equal", [deep, e.constant(np.arange(groups))], hits, label="hits")
    ones = e.cast(equal, _FLOAT, "ones")
    inside = e.op("ReduceMax", [ones, e.constant([1])], flat, label="inside", keepdims=0)
    mask = e.op("Cast", [inside], TensorType(flat.shape, _BOOL), label="kept", to=_TO_BOOL)
    column = TensorType((tokens, groups, 1), _BOOL)
    wide = e.op("Unsqueeze", [mask, e.constant([2])], column, label="mask")
    least = e.constant(np.float32(-np.inf))
    left = e.op("Where", [wide, apart, least], split, label="left")
    return e.op("Reshape", [left, e.constant([-1, count])], every)


_TO_BOOL = ir.DataType.BOOL.value
