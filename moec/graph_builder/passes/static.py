"""Fix the sizes of a decoder's buffers, for an engine that is compiled ahead of time."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import call
from moec.graph_builder.ops.operands import BufferedAttention, arguments
from moec.graph_builder.passes.buffers import without_unused
from moec.graph_builder.roles import find_input
from moec.graph_builder.types import TensorType
from moec.spec import names


def make_static(graph: fx.GraphModule, sizes: Mapping[str, int]) -> fx.GraphModule:
    """Rewrite a decoder in place, after `keep_buffers`.

    `sizes` maps symbols of sizes to numbers. Each kind of buffer gets one mask, which all its
    layers share. No input has a default any more. The inputs `ring.total` and `global.total` lose
    their last use, because the masks do not need them.

    Raises:
        MoecError: the graph has no input `input_ids`.
    """
    ids = find_input(graph.graph, names.INPUT_IDS, "make_static")
    masks: dict[fx.Node, fx.Node] = {}  # by the input that says which slots a call writes
    for node in list(graph.graph.nodes):
        if "type" in node.meta:
            node.meta["type"] = _sized(node.meta["type"], sizes)
        if node.op == "placeholder":
            node.meta["default"] = None
        elif node.target == ops.buffered_attention.target:
            old: BufferedAttention[fx.Node] = BufferedAttention(*node.args)
            if old.last not in masks:
                with graph.graph.inserting_before(node):
                    masks[old.last] = call(
                        graph.graph,
                        ops.slot_mask,
                        ids,
                        old.last,
                        old.key,
                        name=f"{names.cache_kind(old.chunk)}.mask",
                    )
            node.args = arguments(replace(old, mask=masks[old.last], chunk=None))
    return without_unused(graph)


def _sized(of: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(of, tuple):
        return tuple(_sized(each, sizes) for each in of)
    return TensorType(tuple(sizes.get(dim, dim) for dim in of.shape), of.dtype)
