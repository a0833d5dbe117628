"""Compare an engine with itself: tokens in several calls through the caches, and in one call."""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from moec.runtime.inputs.image_tokens import features_within, image_mask
from moec.runtime.proof.compare import Tolerance, error
from moec.runtime.proof.near_ties import settled, shown_choices
from moec.runtime.proof.report import Check, spoken
from moec.runtime.session import Session


def chunked_prefill(
    name: str,
    session: Session,
    ids: Tensor,
    lengths: Tensor,
    cuts: Iterable[int],
    whole: Mapping[str, Tensor],
    tolerance: Tolerance,
    reference: Callable[[], Session],
    features: Tensor | None = None,
) -> Check:
    """Append ids [B, S] in chunks that end at columns `cuts`; compare the logits at each end.

    `whole` is the trace of one call without a cache: its logits, and the choices of experts that
    `session` shows. If the chunks choose other experts, the session that `reference` opens decides
    between the two: see `settled`. `features` [N, dim] are those of the N image tokens.
    """
    images = image_mask(session.spec, ids, lengths)
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < ids.shape[1]}), ids.shape[1]]
    cache = session.new_cache(len(ids), 1)  # it grows with each call
    mine = torch.arange(ids.shape[1]) < lengths[:, None]
    before = lengths.cumsum(0) - lengths  # own tokens of the rows above
    routes = shown_choices(session.spec, tolerance)
    chosen = {each: whole[each].new_zeros(*ids.shape, whole[each].shape[1]) for each in routes}
    found, places = [], []
    for start, end in pairwise(edges):
        own = (lengths - start).clamp(0, end - start)
        columns = slice(start, end)
        here = None if features is None else features_within(features, images, slice(None), columns)
        last = torch.zeros(len(ids), session.spec.text.vocab)
        for rows, within, out in session.walk(ids[:, columns], own, cache, here, every=False):
            ends = (own[rows] > within.start) & (own[rows] <= within.stop)
            last[rows][ends] = out["logits"].cpu()[ends, 0]
            for each, experts in chosen.items():
                place = experts[rows, start + within.start : start + within.stop]
                place.copy_(out[each].view_as(place))
        found.append(last[own > 0])
        places.append((before + start + own - 1)[own > 0])
    own_chosen = {each: experts[mine] for each, experts in chosen.items()}
    expected = settled(reference, ids, lengths, own_chosen, whole, features)[torch.cat(places)]
    detail = f"{len(edges) - 1} calls, rows of {spoken(lengths.tolist())} tokens"
    return error(name, torch.cat(found), expected, tolerance, detail)
