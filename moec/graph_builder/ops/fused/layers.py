"""Fused ops on FP8 codes: what a kernel does in one go, and what its numbers must be.

A token's codes and its scale travel together: codes E4M3 [T, K], scale float32 [T]. Products add up
codes in float32 and are scaled and rounded once, at the end; nothing else between two roundings is
narrower than float32. In float32 all of this is what the ops of `fp8` give, one by one.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moec.graph_builder.ops.fp8 import FP8, quantize, token_scale
from moec.graph_builder.ops.linear import rms_norm, skip_norm
from moec.graph_builder.ops.operands import MoeLayer
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import Dim, TensorType
from moec.weights.view import TORCH_DTYPES

Pair = tuple[TensorType, TensorType]


def encoded(rows: Dim, width: Dim) -> Pair:
    """The types of token codes and their scale."""
    return TensorType((rows, width), FP8), TensorType((rows,), torch.float32)


def _encode_rule(x: TensorType) -> Pair:
    need(len(x.shape) == 2, "encode", "x", x.shape, "[T, D]")
    return encoded(*x.shape)


@op("encode(Tensor x) -> (Tensor, Tensor)", _encode_rule)
def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, D] -> codes [T, D] and the scale at which a token's largest element is 448, [T]."""
    scale = token_scale.eager(x, 0, None)
    return quantize.eager(x, scale, 0, 0), scale


def _norm_rule(x: TensorType, weight: TensorType, eps: float) -> Pair:
    rms_norm.rule(x, weight, eps)
    return _encode_rule(x)


@op("norm_fp8(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _norm_rule)
def norm_fp8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm of x [T, D], in x's dtype, as codes [T, D] and scale [T]."""
    return encode.eager(rms_norm.eager(x, weight, eps))


def _skip_rule(
    x: TensorType, y: TensorType, weight: TensorType, eps: float
) -> tuple[TensorType, TensorType, TensorType]:
    need(x == y, "skip_norm_fp8", "y", y, x)
    return *_norm_rule(x, weight, eps), x


@op(
    "skip_norm_fp8(Tensor x, Tensor y, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _skip_rule,
)
def skip_norm_fp8(
    x: Tensor, y: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm of x + y [T, D] as codes [T, D] and scale [T]; and x + y, in x's dtype."""
    normed, total = skip_norm.eager(x, y, weight, eps)
    return *encode.eager(normed), total


def _swiglu_rule(x: TensorType) -> Pair:
    need(len(x.shape) == 2 and x.shape[1] % 2 == 0, "swiglu_fp8", "x", x.shape, "[T, 2F]")
    return encoded(x.shape[0], x.shape[1] // 2)


@op("swiglu_fp8(Tensor x) -> (Tensor, Tensor)", _swiglu_rule)
def swiglu_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, 2F], gate then up -> silu(gate) * up, rounded to x's dtype: codes [T, F], scale [T]."""
    return encode.eager(_swiglu(x.float()).to(x.dtype))


def _swiglu(wide: Tensor) -> Tensor:
    gate, up = wide.chunk(2, -1)
    return functional.silu(gate) * up


def _linear_rule(
    codes: TensorType, scale: TensorType, weight: TensorType, weight_scale: TensorType, dtype: str
) -> TensorType:
    name = "fp8_linear"
    need(codes.dtype == FP8 and len(codes.shape) == 2, name, "codes", codes, "E4M3 [T, K]")
    rows, depth = codes.shape
    expected = TensorType((rows,), torch.float32)
    need(scale == expected, name, "scale", scale, expected)
    expected = TensorType((weight.shape[0], depth), FP8)
    need(weight == expected, name, "weight", weight, expected)
    expected = TensorType(weight.shape[:1], torch.float32)
    need(weight_scale == expected, name, "weight_scale", weight_scale, expected)
    return TensorType((rows, weight.shape[0]), TORCH_DTYPES[dtype])


@op(
    "fp8_linear(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, str dtype) "
    "-> Tensor",
    _linear_rule,
)
def fp8_linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: str
) -> Tensor:
    """codes [T, K], scale [T], weight E4M3 [N, K], weight_scale [N] -> [T, N] in `dtype`."""
    return _product(codes, scale, weight, weight_scale).to(TORCH_DTYPES[dtype])


def _product(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return (codes.float() @ weight.float().t()) * weight_scale * scale[:, None]


def _moe_rule(layer: MoeLayer[TensorType]) -> TensorType:
    name, x, router, down = "moe_layer", layer.x, layer.router, layer.down
    need(len(x.shape) == 2, name, "x", x.shape, "[T, D]")
    need(len(down.shape) == 3 and down.dtype == FP8, name, "down", down, "E4M3 [E + 1, D, F]")
    (count, _, hidden), dim = down.shape, x.shape[1]
    need(router.shape == (count - 1, dim), name, "router", router.shape, (count - 1, dim))
    for label, found, shape, dtype in (
        ("gate_up", layer.gate_up, (count, 2 * hidden, dim), FP8),
        ("gate_up_scale", layer.gate_up_scale, (count, 2 * hidden), torch.float32),
        ("down", down, (count, dim, hidden), FP8),
        ("down_scale", layer.down_scale, (count, dim), torch.float32),
    ):
        need(found == TensorType(shape, dtype), name, label, found, (shape, dtype))
    return x


@op(
    "moe_layer(Tensor x, Tensor router, Tensor gate_up, Tensor gate_up_scale, Tensor down, "
    "Tensor down_scale) -> Tensor",
    _moe_rule,
    MoeLayer,
)
def moe_layer(layer: MoeLayer[Tensor]) -> Tensor:
    """A whole MoE layer, top-1: the chosen expert and the shared one of each token, [T, D].

    Router logits and scores are rounded to x's dtype. The score scales the expert's input; as
    rounding is by token, that is a score times the scale of x's codes, so both experts use the same
    codes. What SwiGLU makes is rounded to x's dtype, and the sum of both experts once, at the end.
    """
    x, shared = layer.x, len(layer.down) - 1
    logits = functional.linear(x.float(), layer.router.float()).to(x.dtype)
    best, chosen = logits.max(-1)
    score = best.float().sigmoid().to(x.dtype).float()
    codes, scale = encode.eager(x)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in [*chosen.unique().tolist(), shared]:
        rows = slice(None) if expert == shared else chosen == expert
        gain = scale[rows] if expert == shared else scale[rows] * score[rows]
        wide = _product(codes[rows], gain, layer.gate_up[expert], layer.gate_up_scale[expert])
        act, act_scale = encode.eager(_swiglu(wide).to(x.dtype))
        out[rows] += _product(act, act_scale, layer.down[expert], layer.down_scale[expert])
    return out.to(x.dtype)


def _norm_moe_rule(
    x: TensorType, skip: TensorType, weight: TensorType, eps: float, *layer: TensorType
) -> tuple[TensorType, TensorType]:
    skip_norm.rule(x, skip, weight, eps)
    return _moe_rule(MoeLayer(x, *layer)), x


@op(
    "norm_moe(Tensor x, Tensor skip, Tensor weight, float eps, Tensor router, Tensor gate_up, "
    "Tensor gate_up_scale, Tensor down, Tensor down_scale) -> (Tensor, Tensor)",
    _norm_moe_rule,
)
def norm_moe(
    x: Tensor, skip: Tensor, weight: Tensor, eps: float, *layer: Tensor
) -> tuple[Tensor, Tensor]:
    """`moe_layer` of rms_norm(x + skip); and x + skip."""
    normed, total = skip_norm.eager(x, skip, weight, eps)
    return moe_layer.eager(normed, *layer), total


def _between_rule(
    x: TensorType, skip: TensorType, weight: TensorType, eps: float, *layer: TensorType
) -> tuple[TensorType, TensorType, TensorType]:
    out, total = _norm_moe_rule(x, skip, weight, eps, *layer[:-1])
    return _skip_rule(total, out, layer[-1], eps)


@op(
    "norm_moe_norm_fp8(Tensor x, Tensor skip, Tensor weight, float eps, Tensor router, "
    "Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor after) "
    "-> (Tensor, Tensor, Tensor)",
    _between_rule,
)
def norm_moe_norm_fp8(
    x: Tensor, skip: Tensor, weight: Tensor, eps: float, *layer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All from one layer's attention to the next: `norm_moe`, then `skip_norm_fp8` by `after`."""
    out, total = norm_moe.eager(x, skip, weight, eps, *layer[:-1])
    return skip_norm_fp8.eager(total, out, layer[-1], eps)
