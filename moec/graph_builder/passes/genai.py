"""Give a decoder the inputs that onnxruntime-genai passes."""

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import call, call_each, tag
from moec.graph_builder.ops.operands import BufferedAttention, arguments
from moec.graph_builder.passes.buffers import without_unused
from moec.graph_builder.roles import find_input
from moec.graph_builder.types import TensorType
from moec.spec import names


def genai_inputs(graph: fx.GraphModule) -> fx.GraphModule:
    """Rewrite `graph` in place, after `keep_buffers`.

    The new input `attention_mask` int64 [batch, total] replaces all inputs except `input_ids` and
    the buffers. Every token gets logits. All buffers hold all positions, because genai may make
    calls that cross a chunk border. So chunked layers get a mask.

    Raises:
        MoecError: the graph has no input `input_ids`.
    """
    ids = find_input(graph.graph, names.INPUT_IDS, "genai_inputs")
    inputs = {n.meta["name"]: n for n in graph.graph.nodes if n.op == "placeholder"}
    with graph.graph.inserting_after(ids):
        mask = graph.graph.placeholder(names.ATTENTION_MASK)
        mask.meta["default"] = None
        shape = (ids.meta["type"].shape[0], "total")
        tag(mask, names.ATTENTION_MASK, TensorType(shape, torch.int64))
    first = next(n for n in graph.graph.nodes if n.op != "placeholder")
    masks: dict[Any, fx.Node] = {}
    with graph.graph.inserting_before(first):
        past, last, total = call_each(
            graph.graph,
            ops.spans_of_mask,
            mask,
            ids,
            name="spans",
            each=(names.PAST_LENGTHS, "last", "total"),
        )
        index = call(graph.graph, ops.columns, ids, name=names.LOGIT_INDEX)
        positions = call(graph.graph, ops.positions, ids, past, name="query_positions")
        keys = call(graph.graph, ops.columns, mask, name="key_positions")
        for node in graph.graph.nodes:
            if node.target != ops.buffered_attention.target:
                continue
            old: BufferedAttention[fx.Node] = BufferedAttention(*node.args)
            if chunk := old.chunk:
                if chunk not in masks:
                    masks[chunk] = call(
                        graph.graph,
                        ops.attention_mask,
                        positions,
                        keys,
                        chunk,
                        None,
                        name="chunk_mask",
                    )
                node.args = arguments(replace(old, mask=masks[chunk], chunk=None))
    given = {names.PAST_LENGTHS: past, names.LOGIT_INDEX: index}
    for kind in (names.RING, names.GLOBAL):
        given |= {names.last(kind): last, names.total(kind): total}
    for name, node in inputs.items():
        if name in given:
            node.replace_all_uses_with(given[name])
        if names.is_past(name):
            batch, heads, _, size = node.meta["type"].shape
            slots = names.slots(names.GLOBAL)
            node.meta["type"] = node.meta["type"].like(batch, heads, slots, size)
    return without_unused(graph, *given)
