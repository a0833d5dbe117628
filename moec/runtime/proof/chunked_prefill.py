"""The same tokens in pieces through the caches, against one call without: an engine with itself."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from moec.runtime.inputs.image_tokens import features_within, image_mask
from moec.runtime.proof.compare import Tolerance, error
from moec.runtime.proof.report import Check, spoken
from moec.runtime.session import Session


def in_pieces(
    name: str,
    session: Session,
    ids: Tensor,
    lengths: Tensor,
    cuts: Iterable[int],
    whole: Tensor,
    tolerance: Tolerance,
    features: Tensor | None = None,
) -> Check:
    """Append ids [B, S] cut at columns `cuts`; compare each piece's end with `whole` [B, S, vocab].

    `features` [N, dim] are those of the rows' own image tokens.
    """
    images = image_mask(session.spec, ids, lengths)
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < ids.shape[1]}), ids.shape[1]]
    cache = session.new_cache(len(ids), 1)  # grows on the way
    pairs = []
    for start, end in pairwise(edges):
        own = (lengths - start).clamp(0, end - start)
        columns = slice(start, end)
        fused = (
            None if features is None else features_within(features, images, slice(None), columns)
        )
        got = session.extend(ids[:, columns], own, cache, fused).cpu()
        pairs += [(got[r], whole[r, start + n - 1]) for r, n in enumerate(own.tolist()) if n]
    found, expected = (torch.stack(side) for side in zip(*pairs, strict=True))
    detail = f"{len(edges) - 1} calls, rows of {spoken(lengths.tolist())} tokens"
    return error(name, found, expected, tolerance, detail)
