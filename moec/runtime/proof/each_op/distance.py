"""How far a value of an engine is from the right one, and how far rounding alone may take it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

#: A value may be this many times as far off as the same op in the dtype of the graph is from the op
#: in float64. Engines add in other orders and have other polynomials for exp and cos.
MULTIPLE = 16.0
#: A token smaller than this share of all tokens counts as large as they: a sum that cancels to near
#: 0, such as a router of few experts, has the noise of its terms.
SMALL = 0.25
#: The share of tokens that a rounding to FP8 may change, and by how much of their size at most: a
#: fused op may break a tie of its router in another way, and the token then has another expert.
FLIPS, FLIPPED = 0.05, 2.0


@dataclass(frozen=True, slots=True)
class Function:
    """How exact engines compute a function that is no sum or product.

    Attributes:
        roundings: the least noise, in roundings of the largest element.
        size: the least size of that element, of each token if it is a tensor [tokens]: near zero,
            polynomials have an absolute error.
    """

    roundings: float = 1.0
    size: float | Tensor = 1e-30


@dataclass(frozen=True, slots=True)
class Distance:
    """The distance of a value from the right one, relative to the largest element of its token.

    Attributes:
        name: the value's name in the graph.
        error: the distance at the worst token.
        limit: how large it may be at that token.
        detail: what differs, where a number does not say it.
    """

    name: str
    error: float
    limit: float
    detail: str = ""

    @property
    def ratio(self) -> float:
        """The distance as a share of the limit; above 1 it is too large."""
        if self.error == 0:
            return 0.0
        return self.error / self.limit if self.limit else math.inf


def sums(x: Tensor, weight: Tensor) -> Function:
    """A product of x [tokens, K] and weight [N, K]: the least size is what its terms make.

    With few outputs the largest may be one whose terms cancel, and the few errors of a call may all
    be small by luck. A sum of K unrelated terms has this size, and an error that goes with it.
    """
    return Function(3.0, x.double().norm(dim=1) * weight.double().square().mean().sqrt())


def worst(distances: Iterable[Distance]) -> dict[str, Distance]:
    """The worst of several distances of each value, by name, in the order of the values."""
    found: dict[str, Distance] = {}
    for each in distances:
        known = found.get(each.name)
        if known is None or not each.ratio <= known.ratio:  # NaN is the worst
            found[each.name] = each
    return found


def distance(
    name: str,
    value: Tensor,
    right: Tensor,
    near: Tensor,
    function: Function = Function(),
    flips: bool = False,
    dtype: torch.dtype | None = None,
) -> Distance:
    """The distance of `value` from `right`, both [tokens, ...]; `near` is `right` with rounding.

    `dtype` is the coarsest type of what the value was computed from, by default its own: an engine
    may leave out a rounding to that type.

    Each token has a limit of its own, because sums that cancel round more than others: a multiple
    of its own noise, or of the usual noise of all tokens if that is larger. With `flips` distances
    are Euclidean, and a few tokens may be further off: a rounding to FP8 went to the other
    neighbour.
    """
    if not value.numel():
        return Distance(name, 0.0, 0.0)
    value, right, noisy = (x.reshape(len(x), -1).double() for x in (value, right, near))
    # experts outside of the chosen groups have a rank of -inf, in all three or not at all
    closed = value.isinf() & (value == right) & (value == noisy)
    value, right, noisy = (x.masked_fill(closed, 0.0) for x in (value, right, noisy))
    if not bool(value.isfinite().all()):
        where = "" if right.isfinite().all() else " in the reference too: look at the weights"
        return Distance(name, math.nan, 0.0, f"not finite{where}")
    norm = partial(torch.linalg.vector_norm, ord=2 if flips else torch.inf, dim=1)
    size = norm(right)
    size = size.maximum(torch.as_tensor(function.size, dtype=size.dtype))
    size = size.maximum(size.quantile(SMALL))
    error, noise = norm(value - right), norm(noisy - right)
    usual = (noise / size).square().mean().sqrt()
    usual = usual.clamp(min=function.roundings * torch.finfo(dtype or near.dtype).eps / 2)
    limit = MULTIPLE * torch.maximum(noise, usual * size)
    if flips:
        few = (error / limit).argsort(descending=True)[: max(1, int(FLIPS * len(error)))]
        limit[few] = limit[few].maximum(FLIPPED * size[few])
    at = int((error / limit).argmax())
    scale = float(size[at])
    return Distance(name, float(error[at]) / scale, float(limit[at]) / scale)


def same_values(name: str, value: Tensor, right: Tensor, known: Tensor | None = None) -> Distance:
    """0 if integers or choices are the same everywhere, else the share that differs."""
    same = value == right
    if known is not None:
        same &= known
    share = 1 - float(same.double().mean()) if same.numel() else 0.0
    detail = f"{int((~same).sum())} of {same.numel()} differ" if share else ""
    return Distance(name, share, 0.0, detail)


def same_codes(name: str, value: Tensor, right: Tensor) -> Distance:
    """The share of FP8 values that differ by more than a rounding to the neighbour."""
    if not value.numel():
        return Distance(name, 0.0, 0.0)
    value, right = value.float(), right.float()
    step = right.abs().clamp(min=2.0**-6) / 8
    off = (value - right).abs()
    share = float((~(off <= 1.01 * step)).double().mean())  # NaN is off too
    # among neighbours, a rounding decides only where the value was in the middle
    moved = float((off != 0).double().mean())
    limit = max(1e-2, 2 / value.numel())
    return Distance(name, max(share, moved), 0.0 if share else limit)
