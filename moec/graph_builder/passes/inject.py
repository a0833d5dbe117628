"""Replace inner values of a graph by inputs, so that a caller can give these values."""

from collections.abc import Sequence

from torch import fx

from moec.graph_builder.builder import tag
from moec.spec.errors import refuse
from moec.spec.names import given


def inject(graph: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """Rewrite `graph` in place: the users of each value in `names` now use an input "NAME.given".

    The graph still computes the values themselves, so that `tap` can make them outputs.

    Raises:
        MoecError: no value has one of the `names`.
    """
    wanted = set(names)
    missing = wanted - {node.meta.get("name") for node in graph.graph.nodes}
    if missing:
        refuse("inject", min(missing), "the name of a value in the graph", "see node.meta['name']")
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    for node in list(graph.graph.nodes):
        if node.op == "placeholder" or node.meta.get("name") not in wanted:
            continue
        with graph.graph.inserting_before(first):
            replacement = graph.graph.placeholder(given(node.meta["name"]).replace(".", "_"))
        replacement.meta["default"] = None
        tag(replacement, given(node.meta["name"]), node.meta["type"])
        node.replace_all_uses_with(replacement)
    graph.recompile()
    return graph
