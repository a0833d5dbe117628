"""Llama 4's mixture of experts: top-k on raw logits, and a sigmoid score on each expert's *input*.

SwiGLU is not linear, so scaling the output instead would be another model. A score of exactly zero
gives exactly zero, which is why running only the chosen experts equals the dense sum over all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moec.graph_builder.ops.linear import swiglu
from moec.graph_builder.ops.operands import Moe, Routed, SeparateMoe
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType, widened


def _route_rule(logits: TensorType, top_k: int) -> tuple[TensorType, TensorType]:
    tokens, experts = logits.shape
    need(0 < top_k <= experts, "route", "top_k", top_k, f"1 to {experts}")
    return logits.like(tokens, top_k), TensorType((tokens, top_k), torch.int64)


@op("route(Tensor logits, int top_k) -> (Tensor, Tensor)", _route_rule)
def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> sigmoid scores [T, k] of the chosen experts, and which they are [T, k].

    No softmax, bias, groups or renormalisation; the sigmoid is taken in float32 and cast back.
    """
    values, experts = logits.topk(top_k, -1)
    return widened(values).sigmoid().to(logits.dtype), experts


def need_routed(name: str, routed: Routed[TensorType]) -> None:
    """Check that scores and experts are [T, k] for x [T, D]."""
    scores, experts, rows = routed.scores, routed.experts, routed.x.shape[0]
    fits = scores.shape == experts.shape and scores.shape[0] == rows
    need(fits, name, "scores, experts", (scores, experts), f"[{rows}, k]")


def _moe_rule(moe: Moe[TensorType]) -> TensorType:
    gate_up, down = moe.gate_up.shape, moe.down.shape
    count, dim, width = gate_up
    need(dim == moe.x.shape[1], "moe", "gate_up", gate_up, f"[E, {moe.x.shape[1]}, 2F]")
    need(width % 2 == 0, "moe", "gate_up", gate_up, "[E, D, 2F], gate then up")
    need(down == (count, width // 2, dim), "moe", "down", down, f"[{count}, F, {dim}]")
    need_routed("moe", moe)
    return moe.x


@op(
    "moe(Tensor x, Tensor scores, Tensor experts, Tensor gate_up, Tensor down) -> Tensor",
    _moe_rule,
    Moe,
)
def moe(moe: Moe[Tensor]) -> Tensor:
    """The sum over each token's k experts e of SwiGLU_e(score * x), [T, D].

    Only chosen experts are read.
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
    "separate_moe(Tensor x, Tensor scores, Tensor experts, Tensor[] gate_up, Tensor[] down)"
    " -> Tensor",
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
    """The sum over each token's experts of ffn(expert, score * x), called for chosen ones only."""
    scaled = routed.x[:, None] * routed.scores[..., None]  # [T, k, D]
    out = torch.zeros_like(scaled)
    for expert in routed.experts.unique().tolist():
        chosen = routed.experts == expert  # [T, k]
        out[chosen] = ffn(expert, scaled[chosen])
    return out.sum(1)
