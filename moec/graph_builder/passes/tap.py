"""Make inner values of a graph outputs as well."""

from collections.abc import Sequence

from torch import fx

from moec.spec.errors import refuse


def tap(graph: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """Rewrite `graph` in place: append the values called `names` to its outputs.

    Raises:
        MoecError: no value has one of the `names`.
    """
    by_name = {node.meta.get("name"): node for node in graph.graph.nodes}
    missing = [name for name in names if name not in by_name]
    if missing:
        refuse("tap", missing[0], "the name of a value in the graph", "see node.meta['name']")
    output = next(node for node in graph.graph.nodes if node.op == "output")
    output.args = ((*output.args[0], *(by_name[name] for name in names)),)
    output.meta["outputs"] = (*output.meta["outputs"], *names)
    graph.recompile()
    return graph
