"""What an engine that is compiled ahead of time wants of a decoder with buffers."""

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
    """A decoder after `keep_buffers`, changed in place; `sizes` gives symbols of sizes numbers.

    Each kind of buffer gets one mask, that all its layers share. No input may be left out, and
    `ring.total` and `global.total`, of which the masks know nothing, go.
    """
    ids = find_input(graph.graph, names.INPUT_IDS, "make_static")
    masks: dict[fx.Node, fx.Node] = {}  # by the input that says where tokens go
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
