"""Choose the likeliest tokens in the graph, so that no logits leave it."""

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import call
from moec.graph_builder.roles import Role, find_input, finder
from moec.spec import names


def choose_best(graph: fx.GraphModule) -> fx.GraphModule:
    """Rewrite a decoder in place: the output `best` [batch, logits] takes the place of `logits`.

    Raises:
        MoecError: the graph lacks the head, or the input `logit_index`.
    """
    head = finder(graph.graph, "greedy")(Role.HEAD)
    index = find_input(graph.graph, names.LOGIT_INDEX, "greedy")
    output = next(node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_after(head):
        best = call(graph.graph, ops.likeliest, head, name="best.packed")
    with graph.graph.inserting_after(best):
        shaped = call(graph.graph, ops.rows_like, best, index, name=names.BEST)
    outputs = dict(zip(output.meta["outputs"], output.args[0], strict=True))
    del outputs[names.LOGITS]
    outputs = {names.BEST: shaped, **outputs}
    output.args, output.meta["outputs"] = (tuple(outputs.values()),), tuple(outputs)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
