"""Join a residual sum and the norm that follows it."""

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import replace


def join_skip_norms(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph`, changed in place: `add` then `rms_norm` becomes `skip_norm`, which gives both."""
    for norm in list(graph.graph.nodes):
        if norm.target != ops.rms_norm.target or norm.args[0].target != ops.add.target:
            continue
        total, weight, eps = norm.args
        with graph.graph.inserting_before(total):
            # The weight is a node of its own, made where the norm was: the sum needs it earlier.
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
    """A parameter's node at the insertion point, used instead of `weight` from there on."""
    moved = graph.get_attr(str(weight.target))
    moved.meta.update(weight.meta)
    weight.replace_all_uses_with(moved)
    graph.erase_node(weight)
    return moved
