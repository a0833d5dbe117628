"""Keep keys and values in buffers that stay in place, instead of passing new caches on."""

import torch
from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import call_each
from moec.graph_builder.types import TensorType


def keep_buffers(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph`, changed in place: append, mask, attention and write become `buffered_attention`.

    Caches turn from [batch, slots, kv_heads * head_dim] to [batch, kv_heads, slots, head_dim]; the
    input `lengths` goes, because every token of a call is one of its row's own.
    """
    nodes = list(graph.graph.nodes)
    past = next(n for n in nodes if n.meta.get("name") == "past_lengths")
    for node in nodes:
        if node.target != ops.attention.target or node.args[3] is None:
            continue
        q, seen_k, seen_v, mask, heads, kv_heads = node.args
        (key, k), (value, v) = seen_k.args, seen_v.args
        for buffer in (key, value):
            buffer.meta["type"] = _by_head(buffer.meta["type"], kv_heads)
        writes = [next(u for u in seen.users if u is not node) for seen in (seen_k, seen_v)]
        kept = (node, *writes)
        names = [each.meta["name"] for each in kept]
        with graph.graph.inserting_before(node):
            results = call_each(
                graph.graph, ops.buffered_attention, q, k, v, key, value, past, None, mask.args[2],
                heads, kv_heads, name=f"{names[0]}.buffered", each=names,
            )  # fmt: skip
        for old, new in zip(kept, results, strict=True):
            old.replace_all_uses_with(new)
    return without_unused(graph, "lengths")


def without_unused(graph: fx.GraphModule, *inputs: str) -> fx.GraphModule:
    """`graph` without nodes whose result nobody uses, and without those `inputs`."""
    graph.graph.eliminate_dead_code()
    for node in list(graph.graph.nodes):
        if node.op == "placeholder" and node.meta["name"] in inputs:
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _by_head(cache: TensorType, kv_heads: int) -> TensorType:
    batch, slots, width = cache.shape
    return cache.like(batch, kv_heads, slots, width // kv_heads)
