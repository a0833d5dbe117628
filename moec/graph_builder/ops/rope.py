"""Rotary positions on adjacent pairs (x0, x1), (x2, x3), ..., in real arithmetic."""

import math

import torch
from torch import Tensor

from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType, widened


def inverse_frequencies(dim: int, theta: float, scaling: list[float]) -> Tensor:
    """float32 [dim / 2]: radians per position of each pair.

    `scaling` is empty or Llama 3's [factor, low, high, original positions]. It divides the
    frequencies of long waves by the factor, keeps those of short waves, and blends in the band
    between. Released Scout has low == high, so there is no band, and the blend would divide by
    zero.
    """
    base: Tensor = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if not scaling:
        return base
    factor, low, high, original = scaling
    waves = 2 * math.pi / base
    scaled = torch.where(waves > original / low, base / factor, base)
    if high == low:
        return scaled
    blend = (original / waves - low) / (high - low)
    band = (waves <= original / low) & (waves >= original / high)
    return torch.where(band, (1 - blend) * base / factor + blend * base, scaled)


def _table_rule(
    positions: TensorType, dim: int, theta: float, scaling: list[float]
) -> tuple[TensorType, TensorType]:
    need(dim % 2 == 0, "rope_table", "dim", dim, "an even number")
    need(len(scaling) in (0, 4), "rope_table", "scaling", scaling, "[] or four numbers")
    table = TensorType((*positions.shape, dim // 2), torch.float32)
    return table, table


@op(
    "rope_table(Tensor positions, int dim, float theta, float[] scaling) -> (Tensor, Tensor)",
    _table_rule,
)
def rope_table(
    positions: Tensor, dim: int, theta: float, scaling: list[float]
) -> tuple[Tensor, Tensor]:
    """positions [B, S] -> cos and sin, float32 [B, S, dim/2].

    Computed for the positions at hand: a table for Scout's 10,485,760 positions would be 5 GB.
    """
    rates = inverse_frequencies(dim, theta, scaling).to(positions.device)
    angles = positions.float()[..., None] * rates
    return angles.cos(), angles.sin()


def _rope_rule(x: TensorType, cos: TensorType, sin: TensorType, heads: int) -> TensorType:
    expected = (*x.shape[:2], x.shape[2] // heads // 2)
    need(x.shape[2] % (2 * heads) == 0, "rope", "x", x.shape, f"width in {heads} even heads")
    need(cos.shape == sin.shape == expected, "rope", "cos, sin", (cos, sin), expected)
    return x


@op("rope(Tensor x, Tensor cos, Tensor sin, int heads) -> Tensor", _rope_rule)
def rope(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate x [B, S, heads*d] by cos and sin [B, S, d/2], in float32, cast back."""
    pairs = widened(x).unflatten(2, (heads, -1, 2))  # [B, S, heads, d/2, 2]
    even, odd = pairs.unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]  # [B, S, 1, d/2]
    out = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return out.flatten(2).to(x.dtype)
