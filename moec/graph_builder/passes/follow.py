"""Make a graph use the experts that another engine chose, where its own choice is a near tie."""

from typing import Any

import torch
from torch import Tensor, fx

from moec.graph_builder import ops
from moec.graph_builder.builder import tag
from moec.graph_builder.ops.moe import weights_of
from moec.graph_builder.ops.operands import Ranks, Route
from moec.graph_builder.roles import Role
from moec.graph_builder.types import TensorType
from moec.spec import names


def follow(graph: fx.GraphModule, limit: float) -> fx.GraphModule:
    """Change `graph` in place: each choice of experts NAME gets an input "NAME.given" [T, k].

    A token uses the given experts if their ranks are within `limit` of those of its best experts,
    as a share of the layer's largest rank; their weights follow. Groups of experts may be near ties
    too. Otherwise, or without the input,
    it uses its best experts. The value NAME itself keeps the graph's own choice, so that `tap` can
    show it.
    """
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    for own in list(graph.graph.nodes):
        if "role" not in own.meta or own.meta["role"].role != Role.CHOICE:
            continue
        name = own.meta["name"]
        route: Any = own.args[0]
        how = Route(*route.args)
        with graph.graph.inserting_before(first):
            given = graph.graph.placeholder(f"{name.replace('.', '_')}_given")
        given.meta["default"] = torch.empty(0, how.top_k, dtype=torch.int64)
        tag(given, names.given(name), TensorType(("given", how.top_k), torch.int64))
        weights = next(each for each in route.users if each is not own)
        with graph.graph.inserting_after(own):
            chosen = graph.graph.call_function(taken, (how.ranks, own, given, limit))
        if how.ranks.target == ops.ranks.target and Ranks(*how.ranks.args).groups > 1:
            chosen.target, chosen.args = taken_of_groups, (*how.ranks.args, own, given, limit)
        with graph.graph.inserting_after(chosen):
            weighed = graph.graph.call_function(_weighed, (*route.args, chosen))
        tag(chosen, names.taken(name), own.meta["type"])
        tag(weighed, names.taken(weights.meta["name"]), weights.meta["type"])
        own.replace_all_uses_with(chosen, lambda user, chosen=chosen: user is not chosen)
        weights.replace_all_uses_with(weighed)
    graph.recompile()
    return graph


def taken(ranks: Tensor, own: Tensor, given: Tensor, limit: float) -> Tensor:
    """The experts [T, k] to use: `given` for a token whose ranks [T, E] allow it, else `own`.

    An engine whose graph chooses another number of experts is not followed.
    """
    if given.shape != own.shape:
        return own
    known = given.clamp(0, ranks.shape[1] - 1)  # a broken engine may give numbers of no expert
    behind = ranks.gather(1, own) - ranks.gather(1, known)
    largest = ranks.where(ranks.isfinite() | ranks.isnan(), 0).abs().max()  # -inf: not in a group
    near = (behind.abs() <= limit * largest) & (known == given)
    return torch.where(near.all(1, keepdim=True), given, own)


def taken_of_groups(
    logits: Tensor,
    bias: Tensor | None,
    score: str,
    groups: int,
    kept: int,
    own: Tensor,
    given: Tensor,
    limit: float,
) -> Tensor:
    """`taken`, if experts are chosen from the `kept` best groups.

    Each group of the given experts is among the best, or within the limit of them. No other expert
    of these groups, and of those that are clearly among the best, is better than the given ones by
    more than the limit.
    """
    if given.shape != own.shape:
        return own
    ranks = ops.ranks.eager(logits, bias, score, 1, 1)
    width = limit * ranks.abs().max()
    each = ranks.reshape(len(ranks), groups, -1)  # [T, G, E / G]
    values = each.topk(2, -1).values.sum(-1)
    order = values.sort(1, descending=True).values
    last, following = (order[:, [at]] for at in (kept - 1, min(kept, groups - 1)))
    best = values >= last
    near = torch.where(best, values - following, last - values) <= 2 * width
    near = near & (kept < groups)
    size = ranks.shape[1] // groups
    known = given.clamp(0, ranks.shape[1] - 1)
    mine = torch.zeros_like(ranks, dtype=torch.bool).scatter(1, known, True)
    used = mine.reshape(each.shape).any(-1)
    clear = best & ~near
    fits = (~used | best | near).all(1) & ((used | clear).sum(1) <= kept)
    rest = (used | clear).repeat_interleave(size, 1) & ~mine
    others = ranks.where(rest, -torch.inf).amax(1)
    worst = ranks.gather(1, known).amin(1)
    fits &= (others - worst <= width) & (known == given).all(1) & (mine.sum(1) == given.shape[1])
    return torch.where(fits[:, None], given, own)


def _weighed(*args: Any) -> Tensor:
    """The weights [T, k] of experts: `args` are the arguments of `route`, and experts [T, k]."""
    *how, experts = args
    return weights_of(Route(*how), experts)
