"""Llama 4's mixture of experts: top-k on raw logits, and a sigmoid score on each expert's *input*.

SwiGLU is not linear, so scaling the output instead would be another model. A score of exactly zero
gives exactly zero, which is why running only the chosen experts equals the dense sum over all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moec.graph_builder.ops.linear import swiglu
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType


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
    return values.float().sigmoid().to(logits.dtype), experts


def _moe_rule(
    x: TensorType, scores: TensorType, experts: TensorType, gate_up: TensorType, down: TensorType
) -> TensorType:
    count, dim, width = gate_up.shape
    need(dim == x.shape[1], "moe", "gate_up", gate_up.shape, f"[E, {x.shape[1]}, 2F]")
    need(width % 2 == 0, "moe", "gate_up", gate_up.shape, "[E, D, 2F], gate then up")
    need(down.shape == (count, width // 2, dim), "moe", "down", down.shape, f"[{count}, F, {dim}]")
    fits = scores.shape == experts.shape and scores.shape[0] == x.shape[0]
    need(fits, "moe", "scores, experts", (scores, experts), f"[{x.shape[0]}, k]")
    return x


@op(
    "moe(Tensor x, Tensor scores, Tensor experts, Tensor gate_up, Tensor down) -> Tensor", _moe_rule
)
def moe(x: Tensor, scores: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [T, D], scores and experts [T, k], gate_up [E, D, 2F], down [E, F, D] -> [T, D].

    Sum over each token's k experts e of SwiGLU_e(score * x). Only chosen experts are read.
    """

    def ffn(expert: int, rows: Tensor) -> Tensor:
        gate, up = (rows @ gate_up[expert].to(x.dtype)).chunk(2, -1)
        return swiglu.eager(gate, up) @ down[expert].to(x.dtype)

    return over_chosen(x, scores, experts, ffn)


def over_chosen(
    x: Tensor, scores: Tensor, experts: Tensor, ffn: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Sum over each token's experts of ffn(expert, score * x), for those that a token chose."""
    scaled = x[:, None] * scores[..., None]  # [T, k, D]
    out = torch.zeros_like(scaled)
    for expert in experts.unique().tolist():
        chosen = experts == expert  # [T, k]
        out[chosen] = ffn(expert, scaled[chosen])
    return out.sum(1)
