"""The checks of a proof that concern the layer of multi-token prediction."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moec.runtime.proof.compare import Tolerance, agreement, error
from moec.runtime.proof.each_op.table import checks_of
from moec.runtime.proof.each_op.watch import watch
from moec.runtime.proof.report import Check
from moec.runtime.proof.under_test import ArtefactUnderTest
from moec.runtime.sampling import Settings
from moec.runtime.session import Session
from moec.spec import names


def mtp_layer(
    tested: ArtefactUnderTest, ids: Tensor, lengths: Tensor, tolerance: Tolerance
) -> Iterator[Check]:
    """Compare the layer op by op with the reference, in pieces with itself, and what it drafts.

    It runs on ids [B, S], each but the first token of a sequence, with the decoder's own hidden
    values. Drafts may change no token of a greedy generation but at near ties.
    """
    spec = tested.artefact.manifest.spec
    session = tested.session(())
    assert session.mtp is not None
    layer, count = session.mtp(), lengths - 1
    cache = session.new_cache(len(ids), ids.shape[1])
    hidden = torch.cat(
        [out[names.HIDDEN].cpu() for _, _, out in session.walk(ids, lengths, cache, every=False)], 1
    )
    seen = watch(tested, "mtp")
    watched = replace(layer, run=seen.run(tested.open("mtp", seen.taps), {}))
    middle = ids.shape[1] // 2
    cuts = [(0, middle), (middle, middle + 1), (middle + 1, ids.shape[1] - 1)]
    found = _last(watched, ids, hidden, count, cuts)
    yield from checks_of(
        seen.found.values(), math.inf if spec.fp8 else tolerance.error, "multi-token prediction, "
    )
    whole = _last(layer, ids, hidden, count, [(0, ids.shape[1] - 1)])
    yield error("multi-token prediction, in pieces", found, whole, tolerance)
    prompt = ids[:1, : int(lengths[0]) // 2]
    plain: Settings = {"temperature": 0.0, "repetition_penalty": 1.0, "stop": ()}
    tokens = session.generate(prompt, max_new_tokens=16, **plain)
    drafting: Settings = {**plain, "mtp": True}
    drafted = session.generate(prompt, max_new_tokens=16, **drafting)
    logits = session.logits(drafted[:, :-1])[0, prompt.shape[1] - 1 :]
    given = logits.gather(1, drafted[0, prompt.shape[1] :, None])[:, 0]
    near = logits.max(-1).values - given <= tolerance.error * logits.abs().max()
    detail = f"{int((tokens == drafted).sum()) - prompt.shape[1]} of 16 tokens as without drafts"
    check = agreement("drafted greedy tokens", near, torch.ones_like(near), tolerance)
    yield replace(check, detail=f"{check.detail}; {detail}" if check.detail else detail)


def _last(
    layer: Session, ids: Tensor, hidden: Tensor, count: Tensor, cuts: list[tuple[int, int]]
) -> Tensor:
    """The logits of each sequence's last token, run in pieces that `cuts` gives."""
    cache = layer.new_cache(len(ids), ids.shape[1])
    last = torch.zeros(len(ids), layer.spec.text.vocab)
    for start, stop in cuts:
        own, width = (count - start).clamp(0, stop - start), slice(start, stop)
        if not own.any():
            continue
        following, before = ids[:, 1:][:, width], hidden[:, width]
        for _, columns, out in layer.walk(following, own, cache, every=False, hidden=before):
            ends = (own > columns.start) & (own <= columns.stop)
            last[ends] = out[names.LOGITS].cpu()[ends, 0]
    return last
