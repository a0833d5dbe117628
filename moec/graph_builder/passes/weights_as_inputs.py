"""Turn the weights of a graph into inputs."""

from torch import fx, nn

from moec.graph_builder.builder import tag
from moec.graph_builder.module import MoecGraph


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
        name = str(node.target)
        if name not in lifted:
            with nodes.inserting_before(first):
                lifted[name] = nodes.placeholder(name.replace(".", "_"))
            lifted[name].meta["default"] = None
            tag(lifted[name], name, node.meta["type"])
        node.replace_all_uses_with(lifted[name])
        nodes.erase_node(node)
    return MoecGraph(nn.Module(), nodes, "MoecGraph")
