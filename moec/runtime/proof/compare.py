"""Compare two results of one computation, and hold their difference against a limit."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moec.runtime.proof.report import Check


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits for one precision.

    In float32 the limit holds for the largest element. In narrower dtypes roundings change some
    tokens a lot. There the limit holds for the Euclidean norm over the best tokens, and `agreement`
    says what share of the tokens these are.

    A rounding may flip a near tie in a router, and the token's values are then quite different. If
    the logits of the experts are within `near`, the reference takes the engine's choice. Without
    `near`, such tokens are among those that may disagree.

    Attributes:
        error: the largest |a - b| / |b| allowed, in the norm of order `order`.
        agreement: the smallest share of tokens that must agree.
        order: the order of the norm; infinity is the largest element.
        near: the difference of two router logits below which they are a near tie, as a share of
            the layer's largest logit; None: the reference always takes its own choice.
        shows_choices: whether runs through the caches show the engine's choices, so that the
            reference can follow them. Where the limits are wide enough without, the engine runs
            as it does for users, who see no choices.
    """

    error: float
    agreement: float
    order: float
    near: float | None = None
    shows_choices: bool = True


TOLERANCES = {
    "fp32": Tolerance(error=1e-4, agreement=1.0, order=torch.inf, near=1e-4),
    "fp16": Tolerance(error=3e-2, agreement=0.98, order=2, near=3e-2),
    "bf16": Tolerance(error=2e-1, agreement=0.9, order=2, near=2e-1, shows_choices=False),
}
#: limits for one layer whose inputs are the same, over the better half of the tokens. The two sides
#: may round a value to different FP8 neighbours, which changes it by a sixteenth; in bf16 that
#: happens to one token in a few. For one token in a hundred such a rounding changes the expert, and
#: attention carries the change to the tokens after it.
SAME_INPUTS = {
    **dict.fromkeys(("fp32", "fp16"), Tolerance(error=1e-3, agreement=0.5, order=2)),
    "bf16": Tolerance(error=5e-2, agreement=0.5, order=2),
}
#: the limit for its attention alone, in bf16: fewer products in a row
SAME_INPUTS_ATTENTION = Tolerance(error=4e-2, agreement=0.5, order=2)
#: limits for the same layer over most tokens, with those that such roundings changed: in bf16 one
#: in ten of a short text
SAME_INPUTS_MOST = {
    **dict.fromkeys(("fp32", "fp16"), Tolerance(error=5e-2, agreement=0.95, order=2)),
    "bf16": Tolerance(error=2e-1, agreement=0.95, order=2),
}
#: the fewest tokens of an expert for which it gets an error of its own
ENOUGH = 8
#: limits for all layers together, in which each such rounding causes others: as large as the error
#: of FP8 itself
FP8_NOISE = Tolerance(error=2e-1, agreement=0.9, order=2, near=2e-1, shows_choices=False)
#: limits for products that round activations to int8 in blocks, over the better half of the tokens:
#: a rounding that flips a router changes a token altogether
FAST_PRODUCTS = Tolerance(error=1e-1, agreement=0.5, order=2)


def error(
    name: str, found: Tensor, expected: Tensor, tolerance: Tolerance, detail: str = ""
) -> Check:
    """Check the error of `found` against `expected`, both [tokens, ...], in the tolerance's norm.

    A value that is not finite fails the check.
    """
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
    """Check the largest of several errors: over all tokens, and over the tokens of each expert.

    chosen [tokens, k] are the experts of each token; experts with fewer than `ENOUGH` tokens are
    left out. Most tokens do not show what is wrong with one expert.
    """
    groups: dict[str, slice | Tensor] = {"": slice(None)}
    groups |= {} if chosen is None else _by_expert(chosen)
    checks = [error(name, found[of], expected[of], tolerance, at) for at, of in groups.items()]
    return max(checks, key=lambda check: (math.isnan(check.found), check.found))


def _by_expert(chosen: Tensor) -> dict[str, Tensor]:
    rows = {f"expert {e}": (chosen == e).any(1) for e in sorted({*chosen.flatten().tolist()})}
    return {name: mine for name, mine in rows.items() if int(mine.sum()) >= ENOUGH}


def agreement(name: str, same: Tensor, clear: Tensor, tolerance: Tolerance) -> Check:
    """Check the share of tokens that agree.

    `same` [tokens] says which tokens agree, `clear` [tokens] which have no near tie. A token that
    disagrees at a near tie counts as agreeing.
    """
    ties = int((~same & ~clear).sum())
    share = float((same | ~clear).double().mean())
    limit = tolerance.agreement
    if limit < 1:  # one token may always disagree
        limit = min(limit, 1 - 1 / len(same))
    detail = f"{len(same)} tokens" + (f", {ties} near ties left out" if ties else "")
    return Check(name, "agreement", share, limit, detail)


def argmax_agreement(name: str, found: Tensor, expected: Tensor, tolerance: Tolerance) -> Check:
    """Check that logits [T, vocab] of both sides choose the same tokens."""
    best = expected.topk(2).values
    clear = best[:, 0] - best[:, 1] > tolerance.error * expected.abs().max()
    return agreement(name, found.argmax(-1) == expected.argmax(-1), clear, tolerance)
