"""Attention over cached and new keys, its mask, and what queries and keys go through before it."""

import torch
from torch import Tensor
from torch.nn import functional

from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType, widened


def _mask_rule(
    queries: TensorType, keys: TensorType, chunk: int | None, window: int | None
) -> TensorType:
    need(keys.shape[0] == queries.shape[0], "attention_mask", "keys", keys.shape, "[B, K]")
    for name, size in (("chunk", chunk), ("window", window)):
        need(size is None or size > 0, "attention_mask", name, size, "None or at least 1")
    return TensorType((queries.shape[0], 1, queries.shape[1], keys.shape[1]), torch.bool)


@op("attention_mask(Tensor queries, Tensor keys, int? chunk, int? window) -> Tensor", _mask_rule)
def attention_mask(queries: Tensor, keys: Tensor, chunk: int | None, window: int | None) -> Tensor:
    """Positions of queries [B, S] and keys [B, K] (-1: none) -> bool [B, 1, S, K], True = attend.

    The mask is causal. With `chunk` a query also sees its own chunk only: the first token of a
    chunk sees only itself. With `window` it sees the last `window` tokens, itself among them. Every
    query sees itself, so no row is empty.
    """
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen &= q - k < window
    return seen if chunk is None else seen & (k // chunk == q // chunk)


def _attention_rule(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    mask: TensorType | None,
    heads: int,
    kv_heads: int,
    scale: float | None,
) -> TensorType:
    need(heads % kv_heads == 0, "attention", "heads", heads, f"a multiple of {kv_heads}")
    need(q.shape[2] % heads == 0, "attention", "q", q.shape, f"width in {heads} heads")
    width = q.shape[2] // heads * kv_heads
    fits = k.shape[2] == width and v.shape[:2] == k.shape[:2] and v.shape[2] % kv_heads == 0
    need(fits, "attention", "k, v", (k, v), f"width {width}")
    need(scale is None or scale > 0, "attention", "scale", scale, "above 0")
    expected = (q.shape[0], 1, q.shape[1], k.shape[1])
    if mask is not None:
        need(mask.shape == expected, "attention", "mask", mask.shape, expected)
    need(q.dtype == k.dtype == v.dtype, "attention", "dtypes", (q, k, v), "one dtype")
    return q.like(*q.shape[:2], v.shape[2] // kv_heads * heads)


@op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, int kv_heads, float? scale)"
    " -> Tensor",
    _attention_rule,
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float | None,
) -> Tensor:
    """q [B, S, heads*d], k [B, K, kv_heads*d], v [B, K, kv_heads*e] -> [B, S, heads*e].

    mask is [B, 1, S, K]; without one every query sees every key, as within an image tile. Grouped
    queries: key head j serves query heads j*heads/kv_heads and on. Scores are multiplied by
    `scale`, or by d^-0.5.
    """
    q, k, v = (_split(x, n).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if q.shape[2] == 1:
        # The heads of a group are queries of one head, so that torch copies no keys for them.
        rows = q.unflatten(1, (kv_heads, -1)).squeeze(3)
        at = None if mask is None else mask.expand(-1, -1, rows.shape[2], -1)
        out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=at, scale=scale)
        return out.flatten(1)[:, None]
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True, scale=scale
    )
    return out.transpose(1, 2).flatten(2)


def _head_norm_rule(x: TensorType, weight: TensorType | None, heads: int, eps: float) -> TensorType:
    need(x.shape[2] % heads == 0, "head_norm", "x", x.shape, f"width in {heads} heads")
    if weight is not None:
        need(weight.shape == (x.shape[2] // heads,), "head_norm", "weight", weight.shape, "a head")
    return x


@op("head_norm(Tensor x, Tensor? weight, int heads, float eps) -> Tensor", _head_norm_rule)
def head_norm(x: Tensor, weight: Tensor | None, heads: int, eps: float) -> Tensor:
    """QK-norm: RMS norm of each head of x [B, S, heads*d], in float32, cast back.

    Then each head is multiplied by weight [d], if there is one. With one head the norm is that of
    the whole projection.
    """
    wide = widened(_split(x, heads))
    wide = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (wide if weight is None else wide * weight.to(x.dtype)).flatten(2)


def _clip_rule(x: TensorType, largest: float) -> TensorType:
    need(largest > 0, "clip", "largest", largest, "above 0")
    return x


@op("clip(Tensor x, float largest) -> Tensor", _clip_rule)
def clip(x: Tensor, largest: float) -> Tensor:
    """The values of x, moved to between -largest and largest."""
    return x.clamp(-largest, largest)


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
