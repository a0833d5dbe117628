"""Compare one call of a graph op by op.

The reference computes each op from the engine's own values: what the ops before it gave. So the
errors of ops do not add up, and the op that is wrong is the one that differs. The reference runs in
float64. Beside it each op runs in the dtype of the graph, on the same values: the distance of these
two is the noise, the error that rounding alone makes here.
"""

from collections.abc import Callable, Iterator, Mapping
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from moec.graph_builder import ops
from moec.graph_builder.ops import FP8
from moec.graph_builder.ops.operands import Ranks, Route
from moec.graph_builder.ops.registry import OPS
from moec.graph_builder.roles import Role
from moec.graph_builder.types import TensorType
from moec.graph_builder.weights import value_of
from moec.runtime.proof.each_op.distance import (
    MULTIPLE,
    Distance,
    Function,
    distance,
    same_codes,
    same_values,
    sums,
)
from moec.spec import names

#: ops whose rounding to FP8 may go to either neighbour, which changes what follows
_ROUND_TO_FP8 = (ops.quantize.target, ops.fp8_moe.target)
#: outputs of a linear layer that are so few that each may be a sum whose terms cancel
FEW = 16
#: the functions for which engines have polynomials
_FUNCTIONS: dict[Any, Function] = {
    ops.swiglu.target: Function(4.0),
    ops.gelu.target: Function(4.0),
    ops.route.target: Function(4.0, 0.125),  # sigmoid
    ops.ranks.target: Function(4.0, 0.125),
}


def each_op(
    graph: fx.GraphModule,
    feeds: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    lengths: Tensor | None,
    given: Mapping[str, Tensor],
) -> Iterator[Distance]:
    """Run `graph` beside the values `found` of an engine, and compare each of these.

    Args:
        graph: the reference, with its weights.
        feeds: the inputs of the call, by name.
        found: values of the engine's call, by the names that they have in `graph`.
        lengths: int64 [B], the tokens of each sequence that are not padding; None for the tower.
        given: values, by name, that the engine's graph used in place of those that it computed.
    """
    exact: dict[fx.Node, Any] = {}
    rounded: dict[fx.Node, Any] = {}
    left = {node: len(node.users) for node in graph.graph.nodes}
    flips: set[fx.Node] = set()
    own: dict[str, Tensor] = {}
    open_names = set(found)
    for node in graph.graph.nodes:
        name = node.meta.get("name")
        if node.op == "placeholder":
            value = feeds.get(name, node.meta["default"])
            if name == names.INPUT_IDS and lengths is not None:
                mine = torch.arange(value.shape[1]) < lengths[:, None]
                own = {"batch": mine, "batch*sequence": mine.flatten()}
            exact[node] = rounded[node] = value
        elif node.op == "get_attr":
            exact[node] = rounded[node] = value_of(graph, node)
        elif node.op == "call_function":
            run = _function(node)
            exact[node] = run(*fx.map_arg(node.args, lambda arg: _double(exact[arg])))
            rounded[node] = run(*fx.map_arg(node.args, rounded.__getitem__))
            if node.target in _ROUND_TO_FP8 or not flips.isdisjoint(node.all_input_nodes):
                flips.add(node)
            if name in found:
                open_names.discard(name)
                value = _laid_out(found[name], rounded[node])
                # An engine may use a name for another value, such as a mask of other width.
                if value.shape == rounded[node].shape:
                    yield _compared(node, value, exact, rounded, own, node in flips)
                    flips.discard(node)
                    exact[node] = rounded[node] = value.to(rounded[node].dtype)
                if not open_names:
                    return
            if name in given:
                value = given[name].reshape(rounded[node].shape)
                exact[node] = rounded[node] = value.to(rounded[node].dtype)
        for used in node.all_input_nodes:  # free what no later op uses; choices need the logits
            left[used] -= 1
            if not left[used] and node.target != ops.route.target:
                exact[used] = rounded[used] = None


def _function(node: fx.Node) -> Callable[..., Any]:
    """What `node` calls, without the checks of operands, which know no float64."""
    if node.target is getitem:
        return getitem
    return OPS[str(node.target._schema.name).partition("::")[2]].eager  # type: ignore[union-attr]


def _double(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_double, value))
    wide = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != FP8
    return value.double() if wide else value


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the shape of `like`: engines keep heads [B, heads, S, d], the reference [B, S, N].

    The result has its own shape where the elements do not fit.
    """
    value = value.cpu()
    if value.dim() == 4 and like.dim() == 3:
        value = value.transpose(1, 2).flatten(2)
    return value.reshape(like.shape) if value.numel() == like.numel() else value


def _compared(
    node: fx.Node,
    value: Tensor,
    exact: Mapping[fx.Node, Any],
    rounded: Mapping[fx.Node, Any],
    own: Mapping[str, Tensor],
    flips: bool,
) -> Distance:
    name, right, near = str(node.meta["name"]), exact[node], rounded[node]
    mask = own.get(node.meta["type"].shape[0])
    if mask is not None and mask.dim() == 2 and value.dim() == 4:  # [B, 1, S, K]
        mask = mask[:, None].expand(value.shape[:3])
    function = _function_of(node, exact)
    if node.target == ops.ranks.target:
        right, near = _in_its_groups(node, value, exact, right, near)
    if mask is not None and mask.shape == value.shape[: mask.dim()]:
        value, right, near = value[mask], right[mask], near[mask]
        if isinstance(function.size, Tensor):
            function = Function(function.roundings, function.size[mask])
    if node.meta.get("role") and node.meta["role"].role == Role.CHOICE:
        route: Any = node.args[0]
        order = exact[Route(*route.args).ranks]
        order = order[own["batch*sequence"]]
        known = value.clamp(0, order.shape[1] - 1)
        # experts that rank equal may stand for each other
        return same_values(name, order.gather(1, known), order.gather(1, right), known == value)
    if near.dtype == FP8:
        return same_codes(name, value.to(FP8), right)
    if not near.is_floating_point():
        return same_values(name, value, right)
    coarsest = _coarsest(node, near.dtype)
    return distance(name, value, right, near, function, flips, coarsest)


def _in_its_groups(
    node: fx.Node,
    value: Tensor,
    exact: Mapping[fx.Node, Any],
    right: Tensor,
    near: Tensor,
) -> tuple[Tensor, Tensor]:
    """The ranks `right` and `near` [T, E] with the groups of experts that the engine kept.

    That is for tokens whose groups are so near a tie that rounding decides. The others keep theirs.
    """
    given: Any = fx.map_arg(node.args, lambda arg: _double(exact[arg]))
    how: Ranks[Tensor] = Ranks(*given)
    every = ops.ranks.eager(how.logits, how.bias, how.score, 1, 1)
    grouped = (len(every), how.groups, -1)
    values = every.reshape(grouped).topk(min(2, every.shape[1] // how.groups), -1).values.sum(-1)
    open_ = value.isfinite()
    mine = open_.reshape(grouped).all(-1)
    whole = (mine == open_.reshape(grouped).any(-1)).all(1) & (mine.sum(1) == how.kept_groups)
    behind = values.where(~mine, -torch.inf).amax(1) - values.where(mine, torch.inf).amin(1)
    width = MULTIPLE * torch.finfo(_coarsest(node, near.dtype)).eps * every.abs().max()
    tie = (whole & (behind <= width))[:, None]
    theirs = every.masked_fill(~open_, -torch.inf)
    return torch.where(tie, theirs, right), torch.where(tie, theirs.to(near.dtype), near)


def _function_of(node: fx.Node, exact: Mapping[fx.Node, Any]) -> Function:
    source: Any = node.args[0] if node.target is getitem else node
    if source.target == ops.linear.target:
        x, weight = exact[source.args[0]], exact[source.args[1]]
        if len(weight) < FEW:
            return sums(x, weight)
    return _FUNCTIONS.get(source.target, Function())


def _coarsest(node: fx.Node, own: torch.dtype) -> torch.dtype:
    """The type with the largest roundings among a node's result and what it takes."""
    source: Any = node.args[0] if node.target is getitem else node
    taken = [each.meta.get("type") for each in source.all_input_nodes if each.op != "get_attr"]
    found = [each.dtype for each in taken if isinstance(each, TensorType)]
    wide = [each for each in (own, *found) if each.is_floating_point and each != FP8]
    return max(wide, key=lambda each: torch.finfo(each).eps)
