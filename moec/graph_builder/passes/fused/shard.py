"""Make the fused graph of one rank's sizes compute what all ranks together compute.

The graph has the weights of one rank (`moec.spec.sharding`). A product with part of its inputs is a
partial sum; the op that uses it adds up those of all ranks first. The tokens' rows come from the
rank that has them, and the logits from all.
"""

from typing import Any

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import call, call_each, stand_in
from moec.graph_builder.roles import Role, finder
from moec.graph_builder.weights import weights_of
from moec.spec.model import ModelSpec
from moec.spec.names import LOGITS
from moec.spec.sharding import Rank, cut_of, length, span

#: an op that adds a product to the residual stream -> the op that adds the ranks' partial sums
_SUMS = {
    ops.skip_norm.target: ops.all_reduce_norm,
    ops.skip_norm_fp8.target: ops.all_reduce_norm_fp8,
}
_SUM_TARGETS = {each.target for each in _SUMS.values()}


def shard(graph: fx.GraphModule, spec: ModelSpec, rank: Rank) -> fx.GraphModule:
    """Rewrite the fused graph of `local(spec, rank)` in place, before `join_neighbours`.

    Nothing changes for a process alone.

    Raises:
        MoecError: the graph lacks a node with a role that the pass looks for.
    """
    if rank.count == 1:
        return graph
    for node in list(graph.graph.nodes):
        if is_partial(node):
            for user in list(node.users):
                _sum(graph.graph, node, user)
    find = finder(graph.graph, "shard")
    embedding, head = find(Role.EMBEDDING), find(Role.HEAD)
    ids, table, dtype = embedding.args
    first, _ = span(spec.text, "vocab", rank)
    with graph.graph.inserting_before(embedding):
        name = str(embedding.meta["name"])
        part = call(graph.graph, ops.embedding_part, ids, table, first, dtype, name=f"{name}.part")
        stand_in(call(graph.graph, ops.all_reduce, part, name=name), embedding)
    each = [Rank(index, rank.count) for index in range(rank.count)]
    sizes = [length(span(spec.text, "vocab", one)) for one in each]
    best = next((user for user in head.users if user.target == ops.likeliest.target), None)
    with graph.graph.inserting_after(head):
        if best is None:
            name = f"{head.meta['name']}.whole"
            whole = call(graph.graph, ops.all_gather, head, sizes, name=name)
            head.replace_all_uses_with(whole, lambda user: user is not whole)
            _widen(whole)
        else:
            name = str(best.meta["name"])
            stand_in(call(graph.graph, ops.likeliest_part, head, first, name=name), best)
    _last_norm(graph.graph)
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        if node.target in _SUM_TARGETS:
            node.update_arg(4, _is_kept(node))
    graph.recompile()
    return graph


def _last_norm(graph: fx.Graph) -> None:
    """Let the norm before the head add up the tokens that get logits, and no others."""
    for norm in list(graph.nodes):
        if norm.target != ops.rms_norm.target:
            continue
        selected: Any = norm.args[0]
        rows = selected.args[0] if selected.target == ops.select.target else selected
        total = rows.args[0] if rows.target == ops.unpack.target else rows
        if total.target != ops.add.target or len(total.users) > 1:
            continue
        x, whole = total.args
        if whole.target != ops.all_reduce.target:
            continue
        _, gain, eps = norm.args
        with graph.inserting_before(norm):
            both = []
            for value in (x, whole.args[0]):
                name = f"{value.meta['name']}.selected"
                packed = call(graph, ops.unpack, value, rows.args[1], name=f"{name}.rows")
                both.append(call(graph, ops.select, packed, selected.args[1], name=name))
            name = str(norm.meta["name"])
            each = (name, f"{name}.total")
            new, _ = call_each(
                graph, ops.all_reduce_norm, *both, gain, eps, True, name=f"{name}.sum", each=each
            )
            stand_in(new, norm)


def is_partial(node: fx.Node) -> bool:
    """Whether a node is a product whose inputs are only those of one rank."""
    weights = (name for each in node.all_input_nodes for name in weights_of(each))
    cuts = filter(None, map(cut_of, weights))
    return node.op == "call_function" and any(cut.axis == -1 for cut in cuts)


def _is_kept(node: fx.Node) -> bool:
    """Whether more than the next sum uses the total of a sum, or something keeps a result."""
    last = len(node.meta["type"]) - 1
    return any(
        (user.target not in _SUM_TARGETS or user.args[0] is not result)
        if result.args[1] == last
        else user.op == "output"
        for result in node.users
        for user in result.users
    )


def _sum(graph: fx.Graph, part: fx.Node, user: fx.Node) -> None:
    """Let `user` add up the partial sums of all ranks."""
    with graph.inserting_before(user):
        if user.target in _SUMS:
            # a result that nobody uses has no node
            results: dict[Any, fx.Node] = {each.args[1]: each for each in user.users}
            name, places = str(user.meta["name"]), range(len(user.meta["type"]))
            each = [results[i].meta["name"] if i in results else f"{name}.{i}" for i in places]
            new = call_each(graph, _SUMS[user.target], *user.args, True, name=name, each=each)
            for place, old in results.items():
                stand_in(new[place], old)
            return
        whole = call(graph, ops.all_reduce, part, name=f"{part.meta['name']}.whole")
        user.replace_input_with(part, whole)


def _widen(logits: fx.Node) -> None:
    """Give the type of `logits` to what follows it, up to the output."""
    for user in logits.users:
        if user.op == "call_function":
            before = user.meta["type"]
            user.meta["type"] = before.like(*before.shape[:-1], logits.meta["type"].shape[-1])
            if user.meta["name"] != LOGITS:
                _widen(user)
