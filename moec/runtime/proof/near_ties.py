"""Make the reference follow an engine's choices of experts at near ties.

A router whose best experts are within a rounding of each other may choose either. The two choices
give quite different values, for which no limit on an error holds. So at a near tie the reference
takes the engine's choice.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moec.runtime.proof.compare import Tolerance
from moec.runtime.session import Session
from moec.spec import names
from moec.spec.model import ModelSpec


def choices(spec: ModelSpec, tolerance: Tolerance) -> list[str]:
    """The names of the values [tokens, k] that hold the engine's choices of experts.

    There are none if the reference does not follow choices in this precision.
    """
    if tolerance.near is None:
        return []
    return [names.chosen(layer.index) for layer in spec.text.all_layers if layer.moe]


def shown_choices(spec: ModelSpec, tolerance: Tolerance) -> list[str]:
    """`choices`, if runs through the caches show them in this precision."""
    return choices(spec, tolerance) if tolerance.shows_choices else []


def following(reference: Session, chosen: Mapping[str, Tensor], lengths: Tensor) -> Session:
    """`reference` that takes the experts `chosen` [tokens, k], by name, at near ties.

    The session is for one call without a cache, on sequences of `lengths` [B]. `chosen` has no rows
    for padding.
    """

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = (torch.arange(feeds["input_ids"].shape[1]) < lengths[:, None]).flatten()
        given = {}
        for name, experts in chosen.items():
            rows = given[names.given(name)] = experts.new_zeros(len(own), experts.shape[1])
            rows[own] = experts
        return reference.run({**feeds, **given})

    return replace(reference, run=run)


def watched(session: Session, taps: list[str]) -> tuple[Session, dict[str, list[Tensor]]]:
    """`session`, and lists that collect the inner values `taps` of each call that it will make."""
    seen: dict[str, list[Tensor]] = {name: [] for name in taps}

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = session.run(feeds)
        for name, calls in seen.items():
            calls.append(out[name].cpu())
        return out

    return replace(session, run=run), seen


def settled(
    reference: Callable[[], Session],
    ids: Tensor,
    lengths: Tensor,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    features: Tensor | None = None,
) -> Tensor:
    """The logits [tokens, vocab] with which a run of an engine must agree.

    `found` are the values of that run on ids [B, S], `expected` those of another run of the same
    engine. If both chose the same experts for every token, the logits are those of `expected`.
    Otherwise the reference decides: the logits are its own, and it follows the choices in `found`
    at near ties.
    """
    chosen = {name: each for name, each in found.items() if name != "logits"}
    if all(torch.equal(each, expected[name]) for name, each in chosen.items()):
        return expected["logits"]
    return following(reference(), chosen, lengths).trace(ids, lengths, [], features)["logits"]
