"""Make quantised products one op, which a kernel may run."""

from typing import Any

import torch
from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import call, call_each, stand_in
from moec.graph_builder.types import TensorType
from moec.weights.view import name_of

#: what both widths of a product must be multiples of, for a kernel to take it
SMALLEST = 32


def fuse_products(graph: fx.GraphModule) -> fx.GraphModule:
    """Rewrite a quantised decoder in place: `encode` and `fp8_linear` in place of `linear`.

    The weight must have a scale for each output, and the input one for each token. Other products,
    those with a bias, and those too narrow for a kernel stay as they are.
    """
    encoded: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in list(graph.graph.nodes):
        found = _found(node)
        if found is None:
            continue
        x, codes, scale = found
        name, dtype = x.meta["name"], name_of(node.meta["type"].dtype)
        with graph.graph.inserting_before(node):
            if x not in encoded:  # q, k and v have one input
                each = f"{name}.encoded.codes", f"{name}.encoded.scale"
                made = call_each(graph.graph, ops.encode, x, name=f"{name}.encoded", each=each)
                encoded[x] = made
            args = (*encoded[x], codes, scale, dtype)
            stand_in(call(graph.graph, ops.fp8_linear, *args, name=node.meta["name"]), node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _found(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The wide input, the FP8 weight and its scale of a product that the op can express."""
    if node.target != ops.linear.target or node.args[2] is not None:
        return None
    rounded, wide, _ = _args(node)
    if not rounded.target == wide.target == ops.dequantize.target:
        return None
    codes, scale, *_ = _args(wide)
    rows, columns = codes.meta["type"].shape
    by_channel = scale.meta["type"] == TensorType((rows,), torch.float32)
    tokens, given, *_ = _args(rounded)
    if (
        not by_channel
        or tokens.target != ops.quantize.target
        or rows % SMALLEST
        or columns % SMALLEST
    ):
        return None
    x = _args(tokens)[0]
    by_token = given.target == ops.token_scale.target and _args(given) == (x, 0, None)
    return (x, codes, scale) if by_token else None


def _args(node: fx.Node) -> Any:
    return node.args
