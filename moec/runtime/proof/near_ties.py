"""Which experts an engine chose for each token, and a reference that agrees at near ties.

A router whose two best experts are a rounding apart may choose either. What follows is another
token, and no limit on an error holds for it. So the reference takes the engine's choice there.
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
    """Names of the choices [tokens, k] that the reference follows; none if flips are tolerated."""
    if tolerance.near is None:
        return []
    return [names.chosen(layer.index) for layer in spec.text.all_layers if layer.moe]


def following(reference: Session, chosen: Mapping[str, Tensor], lengths: Tensor) -> Session:
    """`reference`, for one call with rows of `lengths` [B] and no cache.

    It takes the experts `chosen` [own tokens, k], by name, where its own routers are at near ties.
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
    """`session`, and the inner values `taps` of each call that it will make."""
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
    """The logits [own tokens, vocab] that one run of an engine is held to by another, `expected`.

    If the two chose other experts for a token of rows ids [B, S], the reference decides: then the
    logits are its own, as it follows the choices in `found` at near ties.
    """
    chosen = {name: each for name, each in found.items() if name != "logits"}
    if all(torch.equal(each, expected[name]) for name, each in chosen.items()):
        return expected["logits"]
    return following(reference(), chosen, lengths).trace(ids, lengths, [], features)["logits"]
