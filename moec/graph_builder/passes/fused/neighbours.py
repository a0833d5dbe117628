"""Join a fused op with the op before it, if no other op uses the values between them."""

from operator import getitem
from typing import Any

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import replace

_LATTER = (ops.attend_fp8.target, ops.moe_layer.target)


def join_neighbours(graph: fx.GraphModule) -> fx.GraphModule:
    """Rewrite `graph` in place into fewer ops that each do more, so that fewer kernels start.

    `rope_append` and `attend_fp8` become `attention_fp8`. `skip_norm` and `moe_layer` become
    `norm_moe`. `norm_moe` and `skip_norm_fp8` become `norm_moe_norm_fp8`. Where ranks share the
    model, `moe_layer` and `all_reduce_norm_fp8` become `moe_all_reduce_norm_fp8`.
    """
    for node in list(graph.graph.nodes):
        before: Any = node.args[0] if node.args else None
        if node.target not in _LATTER or len(before.users) > 1:
            continue
        if before.target == ops.rope_append.target:
            rows, *placed, heads, kv_heads, eps = before.args
            args = (rows.args[0], *placed, node.args[4], heads, kv_heads, eps)  # still packed
            _join(graph.graph, node, ops.attention_fp8, args, list(node.users))
            for done in (*node.users, node, before):  # it writes, so no one else removes it
                graph.graph.erase_node(done)
        elif before.target is getitem:
            norm, place = before.args
            if (norm.target, place) == (ops.skip_norm.target, 0):
                total = next(user for user in norm.users if user is not before)
                args = (*norm.args, *node.args[1:])
                _join(graph.graph, node, ops.norm_moe, args, [node, total])
    for node in list(graph.graph.nodes):
        if node.target == ops.all_reduce_norm_fp8.target:
            total, layer, after, eps, whole = node.args
            if layer.target == ops.moe_layer.target and len(layer.users) == 1:
                args = (total, layer.args[0], eps, whole, *layer.args[1:], after)
                _join(graph.graph, node, ops.moe_all_reduce_norm_fp8, args, list(node.users))
        if node.target == ops.skip_norm_fp8.target:
            total, out, after, eps = node.args
            moe: Any = out.args[0] if out.target is getitem else None  # a given value has none
            if (
                moe is not None
                and (total.target, total.args[:1]) == (getitem, (moe,))
                and moe.target == ops.norm_moe.target
                and moe.args[3] == eps
                and all(len(each.users) == 1 for each in (out, total))
            ):
                args = (*moe.args, after)
                _join(graph.graph, node, ops.norm_moe_norm_fp8, args, list(node.users))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _join(
    graph: fx.Graph, node: fx.Node, op: ops.Op, args: tuple[Any, ...], old: list[fx.Node]
) -> None:
    """Put `op` before `node`; its results take the places of the nodes `old`, in order."""
    with graph.inserting_before(node):
        replace(graph, old, op, *args, name=f"{node.meta['name']}.joined")
