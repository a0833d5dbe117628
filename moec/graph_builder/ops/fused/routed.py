"""A whole MoE layer of any routing on FP8 codes, as one op; scores weigh the experts' outputs."""

import torch
from torch import Tensor
from torch.nn import functional

from moec.graph_builder.ops.fp8 import FP8, quantize, spread, token_scale
from moec.graph_builder.ops.linear import swiglu
from moec.graph_builder.ops.moe import ranks, route
from moec.graph_builder.ops.operands import Ranks, Route, RoutedLayer, arguments
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType
from moec.spec.parts.routing import CHOICES


def _rule(layer: RoutedLayer[TensorType]) -> TensorType:
    name, x, down, block = "routed_layer", layer.x, layer.down, layer.block
    need(len(x.shape) == 2, name, "x", x.shape, "[T, D]")
    need(len(down.shape) == 3 and down.dtype == FP8, name, "down", down, "E4M3 [E + n, D, F]")
    (count, _, hidden), dim, experts = down.shape, x.shape[1], layer.router.shape[0]
    need(layer.router.shape == (experts, dim), name, "router", layer.router.shape, (experts, dim))
    need(experts <= count, name, "down", down.shape, f"at least {experts} experts")
    need(layer.choice in CHOICES, name, "choice", layer.choice, " or ".join(CHOICES))
    fits = not block or (dim % block == 0 and hidden % block == 0)
    need(fits, name, "block", block, f"a divisor of {dim} and {hidden}")
    for label, weight, scale, out, inner in (
        ("gate_up", layer.gate_up, layer.gate_up_scale, 2 * hidden, dim),
        ("down", down, layer.down_scale, dim, hidden),
    ):
        expected = TensorType((count, out, inner), FP8)
        need(weight == expected, name, label, weight, expected)
        shape = (count, out // block, inner // block) if block else (count, out)
        expected = TensorType(shape, torch.float32)
        need(scale == expected, name, f"{label}_scale", scale, expected)
    return x


@op(
    "routed_layer(Tensor x, Tensor router, Tensor? bias, Tensor gate_up, Tensor gate_up_scale, "
    "Tensor down, Tensor down_scale, int top_k, str score, str choice, int groups, "
    "int kept_groups, bool normalise, float factor, int block) -> Tensor",
    _rule,
    RoutedLayer,
)
def routed_layer(layer: RoutedLayer[Tensor]) -> Tensor:
    """A whole MoE layer, [T, D]: the weighed sum of a token's experts, and of the shared ones.

    Router logits and weights are rounded to x's dtype, and so is what SwiGLU makes. The inputs of
    both products are quantised by token, or with blocks by token and block. The sum is rounded
    once, at the end.
    """
    x = layer.x
    logits = functional.linear(x.float(), layer.router.float()).to(x.dtype)
    return of_logits(layer, logits)


def of_logits(layer: RoutedLayer[Tensor], logits: Tensor) -> Tensor:
    """`routed_layer` from the router's logits [T, E] on."""
    x, experts = layer.x, len(layer.router)
    by = logits
    if layer.choice == "scores":
        groups = layer.groups, layer.kept_groups
        by = ranks.eager(*arguments(Ranks(logits, layer.bias, layer.score, *groups)))
    routed = Route(logits, by, layer.top_k, layer.score, layer.normalise, layer.factor)
    scores, chosen = route.eager(*arguments(routed))
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in [*chosen.unique().tolist(), *range(experts, len(layer.down))]:
        shared = expert >= experts
        rows = slice(None) if shared else (chosen == expert).any(1)
        gain = 1.0 if shared else (scores.float() * (chosen == expert)).sum(1, keepdim=True)[rows]
        wide = _product(x[rows], layer.gate_up[expert], layer.gate_up_scale[expert], layer.block)
        act = swiglu.eager(*wide.chunk(2, -1)).to(x.dtype)
        out[rows] += gain * _product(act, layer.down[expert], layer.down_scale[expert], layer.block)
    return out.to(x.dtype)


def _product(x: Tensor, weight: Tensor, scale: Tensor, block: int) -> Tensor:
    """x [T, K], quantised, by weight E4M3 [N, K]: float32 [T, N]."""
    by_token = token_scale.eager(x, block, None)
    codes = quantize.eager(x, by_token, 0, block)
    wide = codes.float() * spread(by_token, codes.shape, 0, block)
    return wide @ (weight.float() * spread(scale, weight.shape, 0, block)).t()
