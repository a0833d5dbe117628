"""Attention over cached and new keys, its mask, and the two query treatments of Llama 4."""

import torch
from torch import Tensor
from torch.nn import functional

from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType, widened


def _mask_rule(queries: TensorType, keys: TensorType, chunk: int | None) -> TensorType:
    need(keys.shape[0] == queries.shape[0], "attention_mask", "keys", keys.shape, "[B, K]")
    need(chunk is None or chunk > 0, "attention_mask", "chunk", chunk, "None or at least 1")
    return TensorType((queries.shape[0], 1, queries.shape[1], keys.shape[1]), torch.bool)


@op("attention_mask(Tensor queries, Tensor keys, int? chunk) -> Tensor", _mask_rule)
def attention_mask(queries: Tensor, keys: Tensor, chunk: int | None) -> Tensor:
    """Positions of queries [B, S] and keys [B, K] (-1: none) -> bool [B, 1, S, K], True = attend.

    The mask is causal. With `chunk` a query also sees its own chunk only. This is no sliding
    window: the first token of a chunk sees only itself. Every query sees itself, so no row is
    empty.
    """
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    seen = (k >= 0) & (k <= q)
    return seen if chunk is None else seen & (k // chunk == q // chunk)


def _attention_rule(
    q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None, heads: int, kv_heads: int
) -> TensorType:
    need(heads % kv_heads == 0, "attention", "heads", heads, f"a multiple of {kv_heads}")
    need(q.shape[2] % heads == 0, "attention", "q", q.shape, f"width in {heads} heads")
    width = q.shape[2] // heads * kv_heads
    need(k.shape[2] == width and v.shape == k.shape, "attention", "k, v", (k, v), f"width {width}")
    expected = (q.shape[0], 1, q.shape[1], k.shape[1])
    if mask is not None:
        need(mask.shape == expected, "attention", "mask", mask.shape, expected)
    need(q.dtype == k.dtype == v.dtype, "attention", "dtypes", (q, k, v), "one dtype")
    return q


@op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, int kv_heads) -> Tensor",
    _attention_rule,
)
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, kv_heads: int
) -> Tensor:
    """q [B, S, heads*d], k and v [B, K, kv_heads*d], mask [B, 1, S, K] -> [B, S, heads*d].

    Without a mask every query sees every key, as within an image tile. Grouped queries: key head j
    serves query heads j*heads/kv_heads and on. The scale is d^-0.5.
    """
    q, k, v = (_split(x, n).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def _head_norm_rule(x: TensorType, heads: int, eps: float) -> TensorType:
    need(x.shape[2] % heads == 0, "head_norm", "x", x.shape, f"width in {heads} heads")
    return x


@op("head_norm(Tensor x, int heads, float eps) -> Tensor", _head_norm_rule)
def head_norm(x: Tensor, heads: int, eps: float) -> Tensor:
    """QK-norm: weightless RMS norm of each head of x [B, S, heads*d], in float32, cast back."""
    wide = widened(_split(x, heads))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.flatten(2).to(x.dtype)


def _temperature_rule(positions: TensorType, floor: int, scale: float) -> TensorType:
    need(floor > 0, "temperature", "floor", floor, "at least 1")
    return TensorType((*positions.shape, 1), torch.float32)


@op("temperature(Tensor positions, int floor, float scale) -> Tensor", _temperature_rule)
def temperature(positions: Tensor, floor: int, scale: float) -> Tensor:
    """positions [B, S] -> 1 + scale * log(1 + floor((p + 1) / floor)), float32 [B, S, 1]."""
    steps = torch.floor((positions.float() + 1) / floor)
    return (1 + scale * torch.log1p(steps))[..., None]


def _scale_rule(x: TensorType, factor: TensorType) -> TensorType:
    need(factor.dtype == torch.float32, "scale_queries", "factor", factor, "float32 [B, S, 1]")
    return x


@op("scale_queries(Tensor x, Tensor factor) -> Tensor", _scale_rule)
def scale_queries(x: Tensor, factor: Tensor) -> Tensor:
    """x [B, S, N] times factor [B, S, 1] in float32, cast back."""
    return (x * factor).to(x.dtype)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, x.shape[2] // heads))  # [B, S, heads*d] -> [B, S, heads, d]
