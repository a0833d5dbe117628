"""Give a decoder the inputs that onnxruntime-genai feeds."""

import torch
from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import call, tag
from moec.graph_builder.passes.buffers import without_unused
from moec.graph_builder.types import TensorType


def genai_inputs(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph` after `keep_buffers`, changed in place.

    `attention_mask` int64 [batch, total] replaces `past_lengths` and `logit_index`: every token
    gets logits. All buffers hold all positions, because genai may call across chunk borders, so
    chunked layers get a mask instead of a ring.
    """
    nodes = {n.meta["name"]: n for n in graph.graph.nodes if n.op == "placeholder"}
    ids, past, index = nodes["input_ids"], nodes["past_lengths"], nodes["logit_index"]
    with graph.graph.inserting_after(ids):
        mask = graph.graph.placeholder("attention_mask")
        mask.meta["default"] = None
        tag(mask, "attention_mask", TensorType((ids.meta["type"].shape[0], "total"), torch.int64))
    first = next(n for n in graph.graph.nodes if n.op != "placeholder")
    with graph.graph.inserting_before(first):
        lengths = call(graph.graph, ops.past_of_mask, mask, ids, name="past_lengths")
        past.replace_all_uses_with(lengths)
        index.replace_all_uses_with(call(graph.graph, ops.columns, ids, name="logit_index"))
        positions = call(graph.graph, ops.positions, ids, lengths, name="query_positions")
        keys = call(graph.graph, ops.columns, mask, name="key_positions")
        masks: dict[int, fx.Node] = {}
        for node in graph.graph.nodes:
            if node.target == ops.buffered_attention.target and (chunk := node.args[7]):
                if chunk not in masks:
                    masks[chunk] = call(
                        graph.graph, ops.attention_mask, positions, keys, chunk, name="chunk_mask"
                    )
                node.args = (*node.args[:6], masks[chunk], None, *node.args[8:])
    for node in nodes.values():
        if node.meta["name"].startswith("past."):
            batch, heads, _, size = node.meta["type"].shape
            node.meta["type"] = node.meta["type"].like(batch, heads, "global_slots", size)
    return without_unused(graph, "past_lengths", "logit_index")
