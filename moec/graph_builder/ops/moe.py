"""Mixtures of experts: how a router's logits choose experts, and what the chosen ones compute.

Only chosen experts run. Where a score multiplies an expert's input, a score of exactly zero gives
exactly zero; so running only the chosen experts equals the dense sum over all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moec.graph_builder.ops.linear import swiglu
from moec.graph_builder.ops.operands import Moe, Ranks, Route, Routed, SeparateMoe
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType, widened
from moec.spec.parts.routing import SCORES, WEIGHED

#: added to the sum that scores are divided by, so that scores of zero stay zero
SMALLEST_SUM = 1e-20


def _ranks_rule(ranks: Ranks[TensorType]) -> TensorType:
    (tokens, experts), groups = ranks.logits.shape, ranks.groups
    need(ranks.score in SCORES, "ranks", "score", ranks.score, " or ".join(SCORES))
    need(experts % groups == 0, "ranks", "groups", groups, f"a divisor of {experts}")
    fits = 0 < ranks.kept_groups <= groups
    need(fits, "ranks", "kept_groups", ranks.kept_groups, f"1 to {groups}")
    if ranks.bias is not None:
        need(ranks.bias.shape == (experts,), "ranks", "bias", ranks.bias.shape, (experts,))
    return TensorType((tokens, experts), torch.float32)


@op(
    "ranks(Tensor logits, Tensor? bias, str score, int groups, int kept_groups) -> Tensor",
    _ranks_rule,
    Ranks,
)
def ranks(ranks: Ranks[Tensor]) -> Tensor:
    """What experts are chosen by, the largest first: logits [T, E] -> float32 [T, E].

    That is the score plus the bias; -inf outside of the best groups. A group is as good as its two
    best experts together.
    """
    found = _scores(ranks.logits, ranks.score)
    found = found if ranks.bias is None else found + widened(ranks.bias)
    if ranks.groups == 1:
        return found
    groups = found.unflatten(1, (ranks.groups, -1))  # [T, G, E / G]
    best = groups.topk(2, -1).values.sum(-1).topk(ranks.kept_groups, -1).indices
    kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
    return groups.masked_fill(~kept[..., None], -torch.inf).flatten(1)


def _route_rule(route: Route[TensorType]) -> tuple[TensorType, TensorType]:
    (tokens, experts), top_k = route.logits.shape, route.top_k
    need(0 < top_k <= experts, "route", "top_k", top_k, f"1 to {experts}")
    need(route.ranks.shape == (tokens, experts), "route", "ranks", route.ranks, route.logits)
    need(route.score in SCORES, "route", "score", route.score, " or ".join(SCORES))
    return route.logits.like(tokens, top_k), TensorType((tokens, top_k), torch.int64)


@op(
    "route(Tensor logits, Tensor ranks, int top_k, str score, bool normalise, float factor) "
    "-> (Tensor, Tensor)",
    _route_rule,
    Route,
)
def route(route: Route[Tensor]) -> tuple[Tensor, Tensor]:
    """logits, ranks [T, E] -> the weights [T, k] of the chosen experts, and which they are [T, k].

    The weights are computed in float32 and cast back.
    """
    experts = route.ranks.topk(route.top_k, -1).indices
    return weights_of(route, experts), experts


def weights_of(route: Route[Tensor], experts: Tensor) -> Tensor:
    """The weights [T, k] of `experts` [T, k]."""
    if route.score == "softmax_of_chosen":
        found = widened(route.logits.gather(1, experts)).softmax(-1)
    elif route.score == "sigmoid":
        found = widened(route.logits.gather(1, experts)).sigmoid()
    else:
        found = widened(route.logits).softmax(-1).gather(1, experts)
    if route.normalise:
        found = found / (found.sum(-1, keepdim=True) + SMALLEST_SUM)
    return (found * route.factor).to(route.logits.dtype)


def _scores(logits: Tensor, score: str) -> Tensor:
    wide = widened(logits)
    return wide.sigmoid() if score == "sigmoid" else wide.softmax(-1)


def need_routed(name: str, routed: Routed[TensorType]) -> None:
    """Check that scores and experts are [T, k] for x [T, D]."""
    scores, experts, rows = routed.scores, routed.experts, routed.x.shape[0]
    fits = scores.shape == experts.shape and scores.shape[0] == rows
    need(fits, name, "scores, experts", (scores, experts), f"[{rows}, k]")
    need(routed.weighed in WEIGHED, name, "weighed", routed.weighed, " or ".join(WEIGHED))


def _moe_rule(moe: Moe[TensorType]) -> TensorType:
    gate_up, down = moe.gate_up.shape, moe.down.shape
    count, dim, width = gate_up
    need(dim == moe.x.shape[1], "moe", "gate_up", gate_up, f"[E, {moe.x.shape[1]}, 2F]")
    need(width % 2 == 0, "moe", "gate_up", gate_up, "[E, D, 2F], gate then up")
    need(down == (count, width // 2, dim), "moe", "down", down, f"[{count}, F, {dim}]")
    need_routed("moe", moe)
    return moe.x


@op(
    "moe(Tensor x, Tensor scores, Tensor experts, str weighed, Tensor gate_up, Tensor down) "
    "-> Tensor",
    _moe_rule,
    Moe,
)
def moe(moe: Moe[Tensor]) -> Tensor:
    """The sum over each token's k experts e of SwiGLU_e(score * x) or score * SwiGLU_e(x), [T, D].

    `weighed` says what the scores multiply. Only chosen experts are read.
    """
    return over_chosen(moe, lambda expert, rows: _ffn(rows, *matrices(moe, expert)))


def _separate_moe_rule(moe: SeparateMoe[TensorType]) -> TensorType:
    name, dim = "separate_moe", moe.x.shape[1]
    need(moe.count > 0, name, "down", moe.down, "at least one tensor")
    need(len(moe.gate_up) == 2 * moe.count, name, "gate_up", len(moe.gate_up), 2 * moe.count)
    width = moe.down[0].shape[-1]
    for label, each, shape in (
        *(("gate_up", each, (width, dim)) for each in moe.gate_up),
        *(("down", each, (dim, width)) for each in moe.down),
    ):
        need(each.shape == shape, name, label, each.shape, shape)
    need_routed(name, moe)
    return moe.x


@op(
    "separate_moe(Tensor x, Tensor scores, Tensor experts, str weighed, Tensor[] gate_up, "
    "Tensor[] down) -> Tensor",
    _separate_moe_rule,
    SeparateMoe,
)
def separate_moe(moe: SeparateMoe[Tensor]) -> Tensor:
    """`moe` on weights that each expert has for itself."""
    return over_chosen(moe, lambda expert, rows: _ffn(rows, *matrices(moe, expert)))


def matrices(moe: Moe[Tensor] | SeparateMoe[Tensor], expert: int) -> tuple[Tensor, Tensor]:
    """The weights of one expert in the type of x: gate and up [D, 2F], and down [F, D]."""
    if isinstance(moe, SeparateMoe):
        gate_up = torch.cat([each.to(moe.x.dtype) for each in moe.gate_up[2 * expert :][:2]])
        return gate_up.t(), moe.down[expert].to(moe.x.dtype).t()
    return moe.gate_up[expert].to(moe.x.dtype), moe.down[expert].to(moe.x.dtype)


def _ffn(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (rows @ gate_up).chunk(2, -1)
    return swiglu.eager(gate, up) @ down


def over_chosen(routed: Routed[Tensor], ffn: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The sum over each token's weighed experts: `ffn(expert, rows)` runs for chosen ones only."""
    scores = routed.scores[..., None]  # [T, k, 1]
    rows = routed.x[:, None].expand(*routed.scores.shape, -1)  # [T, k, D]
    if routed.weighed == "input":
        rows = rows * scores
    out = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    for expert in routed.experts.unique().tolist():
        chosen = routed.experts == expert  # [T, k]
        out[chosen] = ffn(expert, rows[chosen])
    return (out if routed.weighed == "input" else out * scores).sum(1)
