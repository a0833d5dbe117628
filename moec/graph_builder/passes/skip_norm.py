"""Join a residual sum with the norm that follows it."""

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import replace


def join_skip_norms(graph: fx.GraphModule) -> fx.GraphModule:
    """Rewrite `graph` in place: `add` and `rms_norm` become `skip_norm`, with both results."""
    for norm in list(graph.graph.nodes):
        if norm.target != ops.rms_norm.target or norm.args[0].target != ops.add.target:
            continue
        total, weight, eps = norm.args
        with graph.graph.inserting_before(total):
            # The new op stands at the sum, so the node of the norm's weight moves there.
            weight = _moved(graph.graph, weight)
            replace(
                graph.graph,
                (norm, total),
                ops.skip_norm,
                *total.args,
                weight,
                eps,
                name=f"{norm.meta['name']}.skip",
            )
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _moved(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """Add a node for the parameter of `weight` at the insertion point; it replaces `weight`."""
    moved = graph.get_attr(str(weight.target))
    moved.meta.update(weight.meta)
    weight.replace_all_uses_with(moved)
    graph.erase_node(weight)
    return moved
