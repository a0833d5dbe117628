"""The loop that generates tokens, one in a step, on a cache that holds the prompts."""

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moec.runtime.cache import Cache
from moec.runtime.engines.gpu import on_host
from moec.runtime.sampling import likeliest

if TYPE_CHECKING:
    from moec.runtime.session import Session


def steps(
    session: "Session",
    logits: Tensor,
    cache: Cache,
    most: int,
    choose: Callable[[Tensor], Tensor],
    ends: Collection[int],
) -> Iterator[list[int | None]]:
    """Yield the tokens of each step: one for each sequence, None for those that have ended.

    The last token of a sequence need not be in the cache afterwards; `cache.lengths` counts what
    is.

    Args:
        session: runs the steps.
        logits: those of the last token of each prompt, float32 [B, vocab].
        cache: the cache of the B prompts, which grows by the tokens that are run.
        most: the most steps.
        choose: chooses tokens, int64 [B], by logits.
        ends: the tokens that end a sequence.
    """
    alive = torch.ones(len(cache.lengths), dtype=torch.bool)
    following: Tensor | None = None  # tokens that the engine has chosen itself
    for step in range(most):
        tokens = choose(logits) if following is None else following
        arrived = on_host(tokens)
        # The GPU starts the next step while the host checks whether a sequence has ended.
        ahead = session.queues and bool(alive.all()) and step + 1 < most
        following = None
        if ahead and choose is likeliest:
            following = session.likeliest(tokens, cache)
        elif ahead:
            logits = session.decode(tokens, cache)
        tokens = arrived()
        new = [int(t) if on else None for t, on in zip(tokens, alive, strict=True)]
        yield new
        alive = torch.tensor([token is not None and token not in ends for token in new])
        if not alive.any() or step + 1 == most:
            break
        if not ahead:
            logits = session.extend(tokens[:, None], alive.long(), cache)


def undrafted_steps(
    session: "Session",
    ids: Tensor,
    lengths: Tensor,
    features: Tensor | None,
    most: int,
    choose: Callable[[Tensor], Tensor],
    ends: Collection[int],
) -> Iterator[list[int | None]]:
    """Do the same for prompts [B, S] of `lengths` [B], with a cache of their own.

    `features` are those of their image tokens.
    """
    longest = int(lengths.max())
    capacity = longest + most - 1  # the last new token is not run
    cache = session.new_cache(len(ids), capacity, longest)
    logits = session.extend(ids, lengths, cache, features)
    yield from steps(session, logits, cache, most, choose, ends)
