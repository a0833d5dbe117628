"""Two results of one computation: how far apart, against which limit."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moec.runtime.proof.report import Check


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits for one precision. Errors are |a - b| over |b| in the norm of order `order`.

    float32 is held to its largest element. In narrower types roundings move some tokens far: there
    the limit is on the Euclidean norm, over the share of tokens that has to agree.

    A router flips where its best experts are a rounding apart, and then its token is another one.
    Where the experts' logits lie within `near`, as a share of the largest, the reference takes the
    engine's choice. Without `near` such tokens are among those that may disagree.
    """

    error: float
    agreement: float
    order: float
    near: float | None = None


TOLERANCES = {
    "fp32": Tolerance(error=1e-4, agreement=1.0, order=torch.inf, near=1e-4),
    "fp16": Tolerance(error=3e-2, agreement=0.98, order=2, near=3e-2),
    "bf16": Tolerance(error=2e-1, agreement=0.9, order=2, near=2e-1),
}
#: of one layer on inputs that are the same, of the better half of the tokens: a rounding to FP8
#: falls on either side of a tie, in bf16 in one of a few tokens, and changes an element by a
#: sixteenth; in one of a hundred it changes the expert, and attention carries that to tokens after
SAME_INPUTS = {
    **dict.fromkeys(("fp32", "fp16"), Tolerance(error=1e-3, agreement=0.5, order=2)),
    "bf16": Tolerance(error=5e-2, agreement=0.5, order=2),
}
#: of the same, with the tokens that such roundings have touched: in bf16 one in ten of a short text
SAME_INPUTS_MOST = {
    **dict.fromkeys(("fp32", "fp16"), Tolerance(error=5e-2, agreement=0.95, order=2)),
    "bf16": Tolerance(error=2e-1, agreement=0.95, order=2),
}
#: tokens of an expert of which the better half says something of it
ENOUGH = 8
#: of all layers, where each such rounding moves others: what is left is as near as FP8 itself is
FP8_NOISE = Tolerance(error=2e-1, agreement=0.9, order=2, near=2e-1)
#: of products that round activations to int8, in blocks: of the better half of the tokens, since a
#: rounding that flips a router changes a token altogether
FAST_PRODUCTS = Tolerance(error=1e-1, agreement=0.5, order=2)


def error(
    name: str, found: Tensor, expected: Tensor, tolerance: Tolerance, detail: str = ""
) -> Check:
    """The error of `found` against `expected`, both [tokens, ...], in the tolerance's norm."""
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    if not bool(found.isfinite().all()) or not bool(expected.isfinite().all()):
        where = "model" if expected.isfinite().all() else "reference too: look at the weights"
        return Check(name, "error", float("nan"), tolerance.error, f"not finite in the {where}")
    norm = partial(torch.linalg.vector_norm, ord=tolerance.order)
    if tolerance.agreement < 1:
        off = norm(found - expected, dim=1) / norm(expected, dim=1).clamp(min=1e-30)
        kept = off.argsort()[: max(1, math.floor(len(off) * tolerance.agreement))]
        found, expected = found[kept], expected[kept]
    ratio = norm(found - expected) / norm(expected).clamp(min=1e-30)
    return Check(name, "error", float(ratio), tolerance.error, detail)


def worst_error(
    name: str, found: Tensor, expected: Tensor, chosen: Tensor | None, tolerance: Tolerance
) -> Check:
    """The largest error, of all tokens and of those of each expert that has `ENOUGH`.

    chosen [tokens, k] are experts. What is wrong with one expert, most tokens do not show.
    """
    groups: dict[str, slice | Tensor] = {"": slice(None)}
    groups |= {} if chosen is None else _by_expert(chosen)
    checks = [error(name, found[of], expected[of], tolerance, at) for at, of in groups.items()]
    return max(checks, key=lambda check: (math.isnan(check.found), check.found))


def _by_expert(chosen: Tensor) -> dict[str, Tensor]:
    rows = {f"expert {e}": (chosen == e).any(1) for e in sorted({*chosen.flatten().tolist()})}
    return {name: mine for name, mine in rows.items() if int(mine.sum()) >= ENOUGH}


def agreement(name: str, same: Tensor, clear: Tensor, tolerance: Tolerance) -> Check:
    """The share that agrees; near ties within the error limit are not held against either side."""
    ties = int((~same & ~clear).sum())
    share = float((same | ~clear).double().mean())
    limit = tolerance.agreement
    if limit < 1:  # of few tokens, one may be off
        limit = min(limit, 1 - 1 / len(same))
    detail = f"{len(same)} tokens" + (f", {ties} near ties left out" if ties else "")
    return Check(name, "agreement", share, limit, detail)


def argmax_agreement(name: str, found: Tensor, expected: Tensor, tolerance: Tolerance) -> Check:
    """Whether logits [T, vocab] choose the same tokens."""
    best = expected.topk(2).values
    clear = best[:, 0] - best[:, 1] > tolerance.error * expected.abs().max()
    return agreement(name, found.argmax(-1) == expected.argmax(-1), clear, tolerance)
