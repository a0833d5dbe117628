"""The dense arithmetic on the packed stream. Weights are cast from what they are stored in."""

import torch
from torch import Tensor
from torch.nn import functional

from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType, widened


def _linear_rule(x: TensorType, weight: TensorType, bias: TensorType | None) -> TensorType:
    fits = len(weight.shape) == 2 and weight.shape[1] == x.shape[-1]
    need(fits, "linear", "weight", weight.shape, f"[out, {x.shape[-1]}]")
    if bias is not None:
        need(bias.shape == weight.shape[:1], "linear", "bias", bias.shape, weight.shape[:1])
    return x.like(*x.shape[:-1], weight.shape[0])


@op("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear_rule)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N] in x's dtype."""
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _norm_rule(x: TensorType, weight: TensorType, eps: float) -> TensorType:
    need(weight.shape == x.shape[-1:], "rms_norm", "weight", weight.shape, x.shape[-1:])
    need(eps > 0, "rms_norm", "eps", eps, "above 0")
    return x


@op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _norm_rule)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [T, D] in float32, cast to x's dtype, *then* multiply by weight [D]."""
    wide = widened(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight.to(x.dtype)


def _layer_norm_rule(x: TensorType, weight: TensorType, bias: TensorType, eps: float) -> TensorType:
    for name, operand in (("weight", weight), ("bias", bias)):
        need(operand.shape == x.shape[-1:], "layer_norm", name, operand.shape, x.shape[-1:])
    need(eps > 0, "layer_norm", "eps", eps, "above 0")
    return x


@op("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", _layer_norm_rule)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [T, D] less its mean, over its deviation, times weight [D] plus bias [D]."""
    return functional.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


def _same_rule(left: TensorType, right: TensorType) -> TensorType:
    need(left == right, "add or swiglu", "operands", (left, right), "one shape and dtype")
    return left


@op("add(Tensor left, Tensor right) -> Tensor", _same_rule)
def add(left: Tensor, right: Tensor) -> Tensor:
    """The sum of two tensors of one shape."""
    return left + right


def _skip_rule(
    x: TensorType, skip: TensorType, weight: TensorType, eps: float
) -> tuple[TensorType, TensorType]:
    need(x == skip, "skip_norm", "skip", skip, x)
    need(weight.shape == x.shape[-1:], "skip_norm", "weight", weight.shape, x.shape[-1:])
    return x, x


@op("skip_norm(Tensor x, Tensor skip, Tensor weight, float eps) -> (Tensor, Tensor)", _skip_rule)
def skip_norm(x: Tensor, skip: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm(x + skip, weight, eps) and x + skip, in one."""
    total = x + skip
    return rms_norm.eager(total, weight, eps), total


@op("swiglu(Tensor gate, Tensor up) -> Tensor", _same_rule)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return functional.silu(gate) * up


@op("gelu(Tensor x) -> Tensor", lambda x: x)
def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), elementwise: the exact form, by erf."""
    return functional.gelu(x)


@op("to_float32(Tensor x) -> Tensor", lambda x: TensorType(x.shape, torch.float32))
def to_float32(x: Tensor) -> Tensor:
    """x in float32; the logits leave the graph so."""
    return x.to(torch.float32, copy=True)
