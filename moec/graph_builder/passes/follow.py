"""Make a graph use the experts that another engine chose, where its own choice is a near tie."""

import torch
from torch import Tensor, fx

from moec.graph_builder.builder import tag
from moec.graph_builder.roles import Role
from moec.graph_builder.types import TensorType
from moec.spec import names


def follow(graph: fx.GraphModule, limit: float) -> fx.GraphModule:
    """Change `graph` in place: each choice of experts NAME gets an input "NAME.given" [T, k].

    A token uses the given experts if their router logits are within `limit` of its best experts'
    logits, as a share of the layer's largest logit. Otherwise, or without the input, it uses its
    best experts. The value NAME itself keeps the graph's own choice, so that `tap` can show it.
    """
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    for own in list(graph.graph.nodes):
        if "role" not in own.meta or own.meta["role"].role != Role.CHOICE:
            continue
        name = own.meta["name"]
        logits, top_k = own.args[0].args
        with graph.graph.inserting_before(first):
            given = graph.graph.placeholder(f"{name.replace('.', '_')}_given")
        given.meta["default"] = torch.empty(0, top_k, dtype=torch.int64)
        tag(given, names.given(name), TensorType(("given", top_k), torch.int64))
        with graph.graph.inserting_after(own):
            chosen = graph.graph.call_function(taken, (logits, own, given, limit))
        tag(chosen, f"{name}.taken", own.meta["type"])
        own.replace_all_uses_with(chosen, lambda user, chosen=chosen: user is not chosen)
    graph.recompile()
    return graph


def taken(logits: Tensor, own: Tensor, given: Tensor, limit: float) -> Tensor:
    """The experts [T, k] to use: `given` for a token whose logits [T, E] allow it, else `own`."""
    if not len(given):
        return own
    known = given.clamp(0, logits.shape[1] - 1)  # a broken engine may give numbers of no expert
    behind = logits.gather(1, own) - logits.gather(1, known)
    near = (behind.abs() <= limit * logits.abs().max()) & (known == given)
    return torch.where(near.all(1, keepdim=True), given, own)
