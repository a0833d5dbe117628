"""Write each new token into the caches, for calls of one token of each sequence."""

from collections.abc import Container
from operator import getitem
from typing import Any

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import call, stand_in
from moec.graph_builder.passes.buffers import without_unused
from moec.graph_builder.roles import find_input
from moec.spec import names
from moec.spec.model import ModelSpec


def has_wide_caches(spec: ModelSpec) -> bool:
    """Whether `write_in_place` can rewrite the decoder: its caches hold what attention sees.

    Caches in FP8 do not: each call makes wide keys and values of them.
    """
    return spec.scheme is None or not spec.scheme.cache


def is_shown(graph: fx.GraphModule, taps: Container[str]) -> bool:
    """Whether `taps` has values of a decoder that `write_in_place` makes other values of."""
    changed = (ops.key_positions, ops.attention_mask, ops.cache_index, ops.cache_append)
    targets = {op.target for op in changed}
    return any(node.target in targets and node.meta["name"] in taps for node in graph.graph.nodes)


def write_in_place(graph: fx.GraphModule) -> fx.GraphModule:
    """Rewrite `graph`, a decoder: its calls have one token of each sequence, and change its caches.

    Inputs and caches stay as they are, but for inputs that such calls do not need: `lengths` and
    image features. Outputs stay too, but for the caches. Attention reads the caches themselves,
    where a decoder for any number of tokens first copies them.

    Raises:
        MoecError: the graph has no input `past_lengths`.
    """
    past = find_input(graph.graph, names.PAST_LENGTHS, "write_in_place")
    (result,) = (node for node in graph.graph.nodes if node.op == "output")
    pairs = zip(result.meta["outputs"], _args(result)[0], strict=True)
    kept = {name: node for name, node in pairs if not names.is_present(name)}
    result.args, result.meta["outputs"] = (tuple(kept.values()),), tuple(kept)
    for node in list(graph.graph.nodes):
        args = _args(node)
        if node.target == ops.fuse.target:
            node.replace_all_uses_with(args[0])
        elif node.target == ops.key_positions.target:
            _stand_in(graph, node, ops.slot_positions, args[0], past)
        elif node.target == ops.cache_index.target:
            _stand_in(graph, node, ops.cache_slot, args[0], past)
        elif node.target == ops.cache_append.target:
            (write,) = (each for each in node.users if each.target == ops.cache_write.target)
            _stand_in(graph, node, ops.cache_put, *args, write.args[1])
    without_unused(graph, names.LENGTHS, names.IMAGE_FEATURES)
    for node in graph.graph.nodes:
        if node.op == "call_function":
            node.meta["type"] = _type(node)
    return graph


def _stand_in(graph: fx.GraphModule, node: fx.Node, op: ops.Op, *args: Any) -> None:
    with graph.graph.inserting_before(node):
        stand_in(call(graph.graph, op, *args, name=node.meta["name"]), node)


def _type(node: fx.Node) -> Any:
    """The type of a node, by the types of its operands."""
    types: Any = fx.map_arg(node.args, lambda each: each.meta["type"])
    if node.target is getitem:
        whole, index = types
        return whole[index]
    return ops.OPS[str(node.target).split(".")[1]].rule(*types)


def _args(node: fx.Node) -> Any:
    return node.args
