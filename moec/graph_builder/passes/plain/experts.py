"""Make each MoE layer one op on joined weights, which a kernel may run."""

from typing import Any

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import call, stand_in
from moec.graph_builder.ops.operands import RoutedLayer, arguments
from moec.graph_builder.passes.buffers import without_unused
from moec.graph_builder.roles import Role, finder
from moec.graph_builder.types import TensorType
from moec.graph_builder.weights import add_weight, drop_unused
from moec.spec import names
from moec.spec.model import ModelSpec
from moec.weights.joined import Joined, joined_experts
from moec.weights.view import STORED


def join_experts(graph: fx.GraphModule, spec: ModelSpec) -> fx.GraphModule:
    """Rewrite an unquantised decoder in place: router and experts of a layer become `routed_layer`.

    `spec` is a `plain_spec`. Layers stay as they are whose experts `joined_experts` does not join.
    A shared expert that is not joined stays a SwiGLU beside the op, and its sum stays an `add`.

    Raises:
        MoecError: the graph lacks a node with a role that the pass looks for.
    """
    find, kinds = finder(graph.graph, "join_experts"), joined_experts(spec)
    known = {node.meta["name"]: node for node in graph.graph.nodes if node.op == "get_attr"}
    for layer in spec.text.all_layers:
        gate_up, down = names.routed(layer.index)
        if layer.experts is None or gate_up not in kinds:
            continue
        router: Any = find(Role.ROUTER, layer.index).args
        old: Any = find(Role.EXPERTS, layer.index)
        count, how = layer.experts.count, layer.experts.routing
        scales = kinds.get(names.scale_of(gate_up))
        block = spec.scheme.block if scales and spec.scheme and len(scales.shape) == 3 else 0
        if kinds[down].shape[0] == count and old.target == ops.add.target:
            _, old = old.args  # the shared expert is the other summand
        with graph.graph.inserting_before(old):
            gate_up_node, gate_up_scale, down_node, down_scale = (
                _parameter(graph, name, kinds[name]) if name in kinds else None
                for weight in (gate_up, down)
                for name in (weight, names.scale_of(weight))
            )
            operands: RoutedLayer[Any] = RoutedLayer(
                router[0],
                router[1],
                known[names.moe(layer.index, "router", "bias")] if how.bias else None,
                gate_up_node,
                gate_up_scale,
                down_node,
                down_scale,
                layer.experts.top_k,
                how.score,
                how.choice,
                how.groups,
                how.kept_groups,
                how.normalise,
                how.factor,
                how.weighed,
                block,
            )
            name = old.meta["name"]
            stand_in(call(graph.graph, ops.routed_layer, *arguments(operands), name=name), old)
    without_unused(graph)
    drop_unused(graph)
    return graph


def _parameter(graph: fx.GraphModule, name: str, kind: Joined) -> fx.Node:
    """A node for the joined tensor `name`."""
    return add_weight(graph, graph.graph, name, TensorType(kind.shape, STORED[kind.dtype]))
