"""Rotary positions on pairs of a head's elements, in real arithmetic."""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType, widened


def inverse_frequencies(dim: int, theta: float, scaling: str, numbers: list[float]) -> Tensor:
    """float32 [dim / 2]: radians per position of each pair.

    `scaling` is a key of `SCALINGS`, `numbers` are those of its formula.
    """
    base: Tensor = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    return SCALINGS[scaling](base, theta, *numbers)


@cache
def rates_on(
    device: torch.device, dim: int, theta: float, scaling: str, numbers: tuple[float, ...]
) -> Tensor:
    """`inverse_frequencies`, copied to a device once: a CUDA graph cannot copy from the host."""
    return inverse_frequencies(dim, theta, scaling, list(numbers)).to(device)


def _plain(base: Tensor, theta: float) -> Tensor:
    return base


def _bands(
    base: Tensor, theta: float, factor: float, low: float, high: float, original: float
) -> Tensor:
    """Divide the frequencies of long waves by `factor`, keep those of short ones, blend between.

    Released Scout has low == high, so there is no band, and the blend would divide by zero.
    """
    waves = 2 * math.pi / base
    scaled = torch.where(waves > original / low, base / factor, base)
    if high == low:
        return scaled
    blend = (original / waves - low) / (high - low)
    band = (waves <= original / low) & (waves >= original / high)
    return torch.where(band, (1 - blend) * base / factor + blend * base, scaled)


def _yarn(
    base: Tensor,
    theta: float,
    factor: float,
    original: float,
    fast: float,
    slow: float,
    whole: float,
) -> Tensor:
    """YaRN: pairs that turn often within the original positions keep their frequencies."""
    dim = 2 * len(base)

    def pair(turns: float) -> float:
        """Which pair turns so often within the original positions."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(fast), pair(slow)
    if whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    blend = ((torch.arange(len(base), dtype=torch.float32) - first) / width).clamp(0, 1)
    return base / factor * blend + base * (1 - blend)


#: ways to scale frequencies, by the `kind` of the spec's scaling; "none" for a spec without
SCALINGS: dict[str, Callable[..., Tensor]] = {"none": _plain, "bands": _bands, "yarn": _yarn}
#: how many numbers each formula has
_COUNTS = {"none": 0, "bands": 4, "yarn": 5}


def _table_rule(
    positions: TensorType,
    dim: int,
    theta: float,
    scaling: str,
    numbers: list[float],
    magnitude: float,
) -> tuple[TensorType, TensorType]:
    need(dim % 2 == 0, "rope_table", "dim", dim, "an even number")
    need(scaling in SCALINGS, "rope_table", "scaling", scaling, " or ".join(SCALINGS))
    count = _COUNTS[scaling]
    need(len(numbers) == count, "rope_table", "numbers", numbers, f"{count} numbers")
    table = TensorType((*positions.shape, dim // 2), torch.float32)
    return table, table


@op(
    "rope_table(Tensor positions, int dim, float theta, str scaling, float[] numbers, "
    "float magnitude) -> (Tensor, Tensor)",
    _table_rule,
)
def rope_table(
    positions: Tensor,
    dim: int,
    theta: float,
    scaling: str,
    numbers: list[float],
    magnitude: float,
) -> tuple[Tensor, Tensor]:
    """positions [B, S] -> cos and sin times magnitude, float32 [B, S, dim/2].

    Computed for the positions at hand: a table for Scout's 10,485,760 positions would be 5 GB.
    """
    rates = rates_on(positions.device, dim, theta, scaling, tuple(numbers))
    angles = positions.float()[..., None] * rates
    return angles.cos() * magnitude, angles.sin() * magnitude


def _rope_rule(
    x: TensorType, cos: TensorType, sin: TensorType, heads: int, pairs: str
) -> TensorType:
    need(pairs in ("adjacent", "halves"), "rope", "pairs", pairs, "adjacent or halves")
    expected = (*x.shape[:2], x.shape[2] // heads // 2)
    need(x.shape[2] % (2 * heads) == 0, "rope", "x", x.shape, f"width in {heads} even heads")
    need(cos.shape == sin.shape == expected, "rope", "cos, sin", (cos, sin), expected)
    return x


@op("rope(Tensor x, Tensor cos, Tensor sin, int heads, str pairs) -> Tensor", _rope_rule)
def rope(x: Tensor, cos: Tensor, sin: Tensor, heads: int, pairs: str) -> Tensor:
    """Rotate x [B, S, heads*d] by cos and sin [B, S, d/2], in float32, cast back.

    A pair is two adjacent elements (x0, x1), (x2, x3), ...; or with pairs "halves" an element of
    the first half of a head and that of the same place in the second.
    """
    split, axis = ((-1, 2), 4) if pairs == "adjacent" else ((2, -1), 3)
    one, two = widened(x).unflatten(2, (heads, *split)).unbind(axis)  # [B, S, heads, d/2] each
    cos, sin = cos[:, :, None], sin[:, :, None]  # [B, S, 1, d/2]
    out = torch.stack([one * cos - two * sin, one * sin + two * cos], axis)
    return out.flatten(2).to(x.dtype)
