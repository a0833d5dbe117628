"""A whole MoE layer with any routing, in plain torch: what target `torch` runs where it has no
kernel for the layer.

A kernel takes the place of this function on CUDA if `moec.kernels.torch.ops.register` implements
`routed_layer`: the operands say all that a kernel needs to know of the routing.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from moec.graph_builder.ops.fp8 import FP8, quantize, spread, token_scale
from moec.graph_builder.ops.linear import linear, swiglu
from moec.graph_builder.ops.moe import ranks, route
from moec.graph_builder.ops.operands import RoutedLayer
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType
from moec.spec.parts.routing import CHOICES, WEIGHED

#: bytes of which torch's grouped product wants the length of a row to be a multiple
_ALIGNED = 16


def _rule(of: RoutedLayer[TensorType]) -> TensorType:
    name, x, down = "routed_layer", of.x, of.down
    need(len(x.shape) == 2, name, "x", x.shape, "[T, D]")
    need(of.choice in CHOICES, name, "choice", of.choice, " or ".join(CHOICES))
    need(of.weighed in WEIGHED, name, "weighed", of.weighed, " or ".join(WEIGHED))
    logits = linear.rule(x, of.router, None)
    how = (of.score, of.groups, of.kept_groups)
    order = logits if of.choice == "logits" else ranks.rule(logits, of.bias, *how)
    route.rule(logits, order, of.top_k, of.score, of.normalise, of.factor)
    need(len(down.shape) == 3, name, "down", down.shape, "[E + n, D, F]")
    (count, dim, hidden), experts = down.shape, of.router.shape[0]
    need(count >= experts, name, "down", down.shape, f"{experts} experts or more")
    need(dim == x.shape[1], name, "down", down.shape, f"[E + n, {x.shape[1]}, F]")
    block = of.block
    fits = not block or (dim % block == 0 and hidden % block == 0)
    need(fits, name, "block", block, f"a divisor of {dim} and {hidden}")
    narrow = of.gate_up_scale is not None
    weights = FP8 if narrow else x.dtype
    need(down.dtype == weights, name, "down", down, weights)
    expected = TensorType((count, 2 * hidden, dim), weights)
    need(of.gate_up == expected, name, "gate_up", of.gate_up, expected)
    for label, found, rows, inner in (
        ("gate_up_scale", of.gate_up_scale, 2 * hidden, dim),
        ("down_scale", of.down_scale, dim, hidden),
    ):
        shape = (count, rows // block, inner // block) if block else (count, rows)
        scales = TensorType(shape, torch.float32) if narrow else None
        need(found == scales, name, label, found, scales)
    return x


@op(
    "routed_layer(Tensor x, Tensor router, Tensor? bias, Tensor gate_up, Tensor? gate_up_scale, "
    "Tensor down, Tensor? down_scale, int top_k, str score, str choice, int groups, "
    "int kept_groups, bool normalise, float factor, str weighed, int block) -> Tensor",
    _rule,
    RoutedLayer,
)
def routed_layer(of: RoutedLayer[Tensor]) -> Tensor:
    """The weighed sum of each token's chosen experts, plus the shared experts if there are any.

    The router is that of `linear`, `ranks` and `route`. Only chosen experts are read. Inputs of FP8
    products are rounded by token, or with blocks by token and block. What SwiGLU makes is rounded
    to x's type; all else of FP8 experts is float32, up to the sum. The rows of wide experts go
    through torch's grouped product, which asks the GPU for nothing; FP8 ones ask once for a layer.
    """
    return of_logits(of, linear.eager(of.x, of.router, None))


def of_logits(of: RoutedLayer[Tensor], logits: Tensor) -> Tensor:
    """`routed_layer` from the router's logits [T, E] on."""
    how = (of.score, of.groups, of.kept_groups)
    order = logits if of.choice == "logits" else ranks.eager(logits, of.bias, *how)
    scores, experts = route.eager(logits, order, of.top_k, of.score, of.normalise, of.factor)
    count = len(of.router)
    flat = experts.flatten()
    by_expert = flat.argsort(stable=True)  # pairs of token and expert
    each = torch.arange(count, device=flat.device)
    ends = torch.searchsorted(flat[by_expert], each, right=True)
    rows, weights = of.x[by_expert // of.top_k], scores.flatten()[by_expert, None]
    if of.weighed == "input":
        rows = rows * weights
    rows = _experts(of, rows, ends)
    if of.weighed == "output":
        rows = rows * weights
    out = torch.empty_like(rows).index_copy_(0, by_expert, rows)
    mixed = out.unflatten(0, (-1, of.top_k)).sum(1)
    for shared in range(count, len(of.down)):
        mixed = mixed + _expert(of, shared, of.x)
    return mixed.to(of.x.dtype)


def _experts(of: RoutedLayer[Tensor], rows: Tensor, ends: Tensor) -> Tensor:
    """rows [N, D], sorted by expert -> [N, D]; `ends` [E] says where the rows of each end."""
    widths = of.down.shape[1:]
    if of.down_scale is None and not any(n * rows.itemsize % _ALIGNED for n in widths):
        product = partial(functional.grouped_mm, offs=ends.int())
        gate, up = product(rows, of.gate_up[: len(ends)].mT).chunk(2, -1)
        return product(swiglu.eager(gate, up), of.down[: len(ends)].mT)
    stops = ends.tolist()
    spans = enumerate(zip([0, *stops], stops, strict=False))
    return torch.cat([_expert(of, i, rows[a:b]) for i, (a, b) in spans if a < b])


def _expert(of: RoutedLayer[Tensor], index: int, rows: Tensor) -> Tensor:
    """What one expert makes of rows [N, D]: [N, D], in float32 if its weights are FP8."""

    def product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return functional.linear(x, weight[index])
        by_token = token_scale.eager(x, of.block, None)
        wide = quantize.eager(x, by_token, 0, of.block).float()
        wide = wide * spread(by_token, wide.shape, 0, of.block)
        by_output = spread(scale[index], weight[index].shape, 0, of.block)
        return wide @ (weight[index].float() * by_output).t()

    gate, up = product(rows, of.gate_up, of.gate_up_scale).chunk(2, -1)
    return product(swiglu.eager(gate, up).to(rows.dtype), of.down, of.down_scale)
