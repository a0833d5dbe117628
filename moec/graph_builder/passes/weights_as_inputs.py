"""Turn the weights of a graph into inputs."""

from functools import partial
from typing import Any

from torch import fx, nn

from moec.graph_builder.builder import tag
from moec.graph_builder.module import MoecGraph
from moec.graph_builder.weights import is_list, weights_of


def lift_weights(graph: fx.GraphModule) -> fx.GraphModule:
    """Make a graph from `graph` with its weights as inputs, after all other inputs.

    `graph` cannot be used afterwards. An input has the name of its weight; `Builder.input` says how
    the module's signature writes it.
    """
    nodes, lifted = graph.graph, dict[str, fx.Node]()
    first = next(node for node in nodes.nodes if node.op != "placeholder")
    for node in list(nodes.nodes):
        if node.op != "get_attr":
            continue
        kinds = weights_of(node)
        for name, kind in kinds.items():
            if name in lifted:
                continue
            with nodes.inserting_before(first):
                lifted[name] = nodes.placeholder(name.replace(".", "_"))
            lifted[name].meta["default"] = None
            tag(lifted[name], name, kind)
        inputs = [lifted[name] for name in kinds]
        given: dict[fx.Node, Any] = {node: inputs if is_list(node) else inputs[0]}
        for user in list(node.users):
            user.args = fx.map_arg(user.args, partial(_in_place, given))
        nodes.erase_node(node)
    return MoecGraph(nn.Module(), nodes, "MoecGraph")


def _in_place(given: dict[fx.Node, Any], node: fx.Node) -> Any:
    return given.get(node, node)
