"""Generate tokens with drafts, which the layer of multi-token prediction makes.

In a step the layer drafts the token after the next one, and the decoder runs both. Where it would
have chosen the draft itself, the step gives two tokens, else one. So the tokens are those that the
decoder gives by itself, but for near ties: it runs two tokens in one call.

The layer takes a token together with the decoder's hidden value of the token before. Its cache has
therefore one token less than the decoder's.
"""

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from moec.runtime.batching import Ends, ends_of, logits_of
from moec.runtime.cache import Cache
from moec.runtime.sampling import likeliest
from moec.spec import names
from moec.spec.errors import refuse

if TYPE_CHECKING:
    from moec.runtime.session import Session


def drafted_steps(
    session: "Session",
    ids: Tensor,
    lengths: Tensor,
    features: Tensor | None,
    most: int,
    choose: Callable[[Tensor], Tensor],
    ends: Collection[int],
) -> Iterator[list[int | None]]:
    """Yield tokens: one for each sequence, None for those that have ended or had a wrong draft.

    The arguments are those of `undrafted_steps`. If `choose` keeps a state, drafts count only where
    those of all sequences are right, so that it is asked for the same tokens as without drafts.

    Raises:
        MoecError: the model has no layer of multi-token prediction, or the artefact leaves it out.
    """
    layer = _layer_of(session)
    longest = int(lengths.max())
    capacity = longest + most - 1  # the last new token is not run
    cache, own = (each.new_cache(len(ids), capacity, longest) for each in (session, layer))
    logits, hidden = _prefill(session, layer, ids, lengths, features, cache, own)
    tokens = choose(logits).cpu()
    left = torch.full_like(tokens, most)
    alive = torch.ones(len(ids), dtype=torch.bool)

    def given(some: Tensor, at: Tensor) -> list[int | None]:
        """The tokens of the sequences `at`, which then have fewer left, and may have ended."""
        left[at] -= 1
        over = torch.tensor([int(token) in ends for token in some])
        alive[at & (over | (left == 0))] = False
        return [int(token) if there else None for token, there in zip(some, at, strict=True)]

    yield given(tokens, alive.clone())
    news, before, count = tokens[:, None], hidden[:, None], alive.long()
    while alive.any():
        drafts = torch.zeros_like(tokens)
        for _, _, out in layer.walk(news, count, own, every=False, hidden=before):
            drafts = out[names.LOGITS][:, 0].argmax(-1).cpu()
        count = left.clamp(max=2) * alive
        pairs = torch.stack([tokens, drafts], 1)[:, : int(count.max())]
        ((_, _, out),) = session.walk(pairs, count, cache)
        first, ran = choose(out[names.LOGITS][:, 0]).cpu(), alive.clone()
        yield given(first, ran)
        right = alive & (first == drafts)
        if choose is not likeliest and bool((alive & ~right).any()):
            right = torch.zeros_like(right)
        second = choose(out[names.LOGITS][:, 1]).cpu() if bool(right.any()) else first
        cache.lengths = cache.lengths - ((count == 2) & ~right).long()
        if bool(right.any()):
            yield given(second, right)
        tokens = torch.where(right, second, first)
        news, before = torch.stack([first, second], 1), out[names.HIDDEN]
        count = (1 + right.long()) * alive


def _prefill(
    session: "Session",
    layer: "Session",
    ids: Tensor,
    lengths: Tensor,
    features: Tensor | None,
    cache: Cache,
    own: Cache,
) -> tuple[Tensor, Tensor]:
    """Run prompts [B, S]; return the logits of each last token and its hidden value, [B, dim].

    The layer gets all tokens but each sequence's first, which has no token before it.
    """
    found: list[Ends] = []
    hidden: Tensor | None = None
    following = functional.pad(ids[:, 1:], (0, 1))
    for rows, columns, out in session.walk(ids, lengths, cache, features, every=False):
        width, here = columns.stop - columns.start, out[names.HIDDEN]
        ends = ends_of((rows, columns), lengths, out[names.LOGITS], found)
        if hidden is None:
            hidden = here.new_zeros(len(ids), here.shape[-1])
        hidden[rows][ends] = here[ends, lengths[rows][ends] - 1 - columns.start]
        count = (lengths[rows] - 1 - columns.start).clamp(0, width)
        if count.any():
            for _ in layer.walk(following[rows, columns], count, own, every=False, hidden=here):
                pass
    assert hidden is not None
    return logits_of(found, len(ids), session.spec.text.vocab), hidden


def _layer_of(session: "Session") -> "Session":
    if session.mtp is not None:
        return session.mtp()
    has = session.spec.text.mtp == "aside"
    refuse(
        "mtp",
        f"{session.spec.name} without its layer of multi-token prediction"
        if has
        else f"{session.spec.name}, which has no layer of multi-token prediction",
        "an artefact that was built with --mtp",
        "moec build --checkpoint DIR --mtp" if has else "leave mtp out",
    )
