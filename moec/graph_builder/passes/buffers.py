"""Keep keys and values in buffers that a call writes into, instead of returning new caches."""

from typing import Any

import torch
from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import replace, tag
from moec.graph_builder.roles import find_input
from moec.graph_builder.types import TensorType
from moec.spec import names
from moec.spec.model import TextSpec


def has_buffers(text: TextSpec) -> bool:
    """Whether `keep_buffers` can rewrite the decoder: all caches are of keys and values in order.

    A latent vector is no key and no value, and the ring of a sliding window starts anywhere.
    """
    return text.latent is None and text.window is None


def keep_buffers(graph: fx.GraphModule) -> fx.GraphModule:
    """Rewrite `graph` in place: append, mask, attention and write become `buffered_attention`.

    The caches change from [batch, slots, kv_heads * head_dim] to
    [batch, kv_heads, slots, head_dim]. New inputs say which slots a call writes: `ring.last`
    [batch] and `ring.total` for chunked layers, `global.last` and `global.total` for the others.
    The input `lengths` is removed, because a call has no padding.

    Raises:
        MoecError: the graph has no input `lengths`.
    """
    after = find_input(graph.graph, names.LENGTHS, "keep_buffers")
    batch = after.meta["type"].shape
    spans: dict[int | None, tuple[fx.Node, fx.Node]] = {}
    for node in list(graph.graph.nodes):
        if node.target != ops.attention.target or node.args[3] is None:
            continue
        q, seen_k, seen_v, mask, heads, kv_heads, _ = node.args
        (key, k), (value, v), chunk = seen_k.args, seen_v.args, mask.args[2]
        if chunk not in spans:
            kind = names.cache_kind(chunk)
            spans[chunk] = (
                _input(graph, after, names.last(kind), batch),
                _input(graph, after, names.total(kind), ()),
            )
        for buffer in (key, value):
            buffer.meta["type"] = _by_head(buffer.meta["type"], kv_heads)
        users = [*seen_k.users, *seen_v.users]
        writes = [user for user in users if user.target == ops.cache_write.target]
        with graph.graph.inserting_before(node):
            replace(
                graph.graph,
                (node, *writes),
                ops.buffered_attention,
                q,
                k,
                v,
                key,
                value,
                *spans[chunk],
                None,
                chunk,
                heads,
                kv_heads,
                name=f"{node.meta['name']}.buffered",
            )
    return without_unused(graph, names.LENGTHS)


def _input(graph: fx.GraphModule, after: fx.Node, name: str, shape: tuple[Any, ...]) -> fx.Node:
    with graph.graph.inserting_after(after):
        node = graph.graph.placeholder(name.replace(".", "_"))
    node.meta["default"] = None
    return tag(node, name, TensorType(shape, torch.int32))


def without_unused(graph: fx.GraphModule, *inputs: str) -> fx.GraphModule:
    """Remove the nodes whose results nobody uses, and the inputs called `inputs`."""
    graph.graph.eliminate_dead_code()
    for node in list(graph.graph.nodes):
        if node.op == "placeholder" and node.meta["name"] in inputs:
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _by_head(cache: TensorType, kv_heads: int) -> TensorType:
    batch, slots, width = cache.shape
    return cache.like(batch, kv_heads, slots, width // kv_heads)
