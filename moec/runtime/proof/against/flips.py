"""Make the reference take the experts that another engine took at near ties of routers.

The engine shows no choices of experts. So where a token differs and one of its routers has a near
tie, the reference tries the other expert, and keeps it if the token then agrees better. No token is
left out: all of them are compared with a reference whose choices are right ones.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moec.runtime.open import eager_session
from moec.runtime.proof.near_ties import following
from moec.spec import names
from moec.spec.model import ModelSpec
from moec.weights.shard import TensorEntry

#: the difference of two routers' logits below which they are a near tie, as a share of the layer's
#: largest: engines in float32 differ by some 2e-6
NEAR = 1e-5
#: how many near ties of a prompt are tried
TRIES = 16


def settled_values(
    spec: ModelSpec, entries: dict[str, TensorEntry], ids: Sequence[int], new: Sequence[int],
    theirs: Tensor, least: float,
) -> tuple[dict[str, Tensor], int]:  # fmt: skip
    """The reference's values for a prompt `ids` and its continuation `new`.

    Args:
        theirs: the engine's log-probabilities [S - 1] of the prompt's tokens from the second on.
        least: a token differs if its log-probability is further off.

    Returns:
        The log-probabilities [S, vocab] of each next token, as "logits", and the experts that each
        MoE layer chose, by name; and in how many near ties the other expert was taken.
    """
    moe = [layer for layer in spec.text.all_layers if layer.moe]
    ranks = {names.chosen(layer.index): layer.ranked_by for layer in moe}
    taps = [*ranks, *ranks.values()]
    session = eager_session(spec, entries, "fp32", taps=taps, near=NEAR)
    row = torch.tensor([[*ids, *new]])
    lengths = torch.tensor([row.shape[1]])

    def run(flips: dict[tuple[int, str], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        given: dict[str, Tensor] = {}
        for (token, name), experts in flips.items():
            own = given.setdefault(name, torch.full((row.shape[1], len(experts)), -1))  # no expert
            own[token] = experts
        found = following(session, given, lengths).trace(row, lengths, taps)
        found["logits"] = found["logits"].double().log_softmax(-1)
        return found, (theirs - own_tokens(found["logits"], ids)).abs()

    values, off = run({})
    taken: dict[tuple[int, str], Tensor] = {}
    tried = set[tuple[int, str]]()
    while len(tried) < TRIES:
        ties = _near_ties(values, ranks, off > least)
        tie = next(((at, experts) for at, experts in ties if at not in tried), None)
        if tie is None:
            break
        (token, name), experts = tie
        tried.add((token, name))
        flips = taken | {(token, name): experts}
        other, closer = run(flips)
        if closer[token] < off[token]:
            values, off, taken = other, closer, flips
    return {name: values[name] for name in (*ranks, "logits")}, len(taken)


def own_tokens(likely: Tensor, ids: Sequence[int]) -> Tensor:
    """The log-probabilities of a prompt's own tokens, from the second one on."""
    return likely[range(len(ids) - 1), list(ids[1:])]


def _near_ties(
    values: dict[str, Tensor], ranks: dict[str, str], odd: Tensor
) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """The near ties of the tokens `odd` [S - 1], the first token's first: where, and the experts.

    The experts are those that were chosen, but for the last, whose place the next one takes.
    """
    found = []
    for layer, (name, ranked) in enumerate(ranks.items()):
        rank, own = values[ranked].double(), values[name]
        largest = rank.where(rank.isfinite(), 0).abs().max()
        last = rank.gather(1, own).argmin(1, keepdim=True)
        rest = rank.scatter(1, own, -torch.inf)
        behind = rank.gather(1, own.gather(1, last)) - rest.amax(1, keepdim=True)
        near = (behind <= NEAR * largest).flatten()[: len(odd)] & odd
        other = own.scatter(1, last, rest.argmax(1, keepdim=True))
        found += [(int(token), layer, name, other[token]) for token in near.nonzero()]
    for token, _, name, experts in sorted(found, key=lambda each: each[:2]):
        yield (token, name), experts
