"""The checks of a proof that concern the decoder.

`layer_by_layer` compares one call with the reference. `cached_decode` compares the engine with
itself, in one call and in several. `generation` judges the tokens that the engine chooses.

In names, `tested` is the artefact under test, `found` its values, and `expected` the reference's.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moec.graph_builder.ops import FP8
from moec.runtime.proof.chunked_prefill import chunked_prefill
from moec.runtime.proof.compare import (
    SAME_INPUTS,
    SAME_INPUTS_ATTENTION,
    SAME_INPUTS_MOST,
    Tolerance,
    agreement,
    argmax_agreement,
    error,
    worst_error,
)
from moec.runtime.proof.each_op.stage import shown_layers
from moec.runtime.proof.near_ties import (
    choices,
    following,
    settled,
    shown_choices,
    watched,
)
from moec.runtime.proof.report import Check
from moec.runtime.proof.under_test import ArtefactUnderTest
from moec.spec import names


def layer_by_layer(
    tested: ArtefactUnderTest,
    ids: Tensor,
    lengths: Tensor,
    tolerance: Tolerance,
    found: dict[str, Tensor],
) -> Iterator[Check]:
    """Compare every layer's output and choice of experts, then the logits, of one call.

    `found` are the engine's values of ids [B, S], as `shown_layers` names them, and the logits.
    """
    spec = tested.artefact.manifest.spec
    layers = spec.text.all_layers
    ranks = {layer.index: layer.ranked_by for layer in layers if layer.moe}
    chosen = {i: names.chosen(i) for i in ranks}
    taps = shown_layers(spec)
    if tolerance.near is not None:
        taps += [names.taken(name) for name in chosen.values()]
    reference = tested.reference(taps, tolerance.near)
    followed = {name: found[name] for name in choices(spec, tolerance)}
    expected = following(reference, followed, lengths).trace(ids, lengths, taps)
    if spec.fp8:
        yield from _each_layer(tested, ids, lengths, found)
    own = torch.arange(ids.shape[1]) < lengths[:, None]
    yield error("embed", found[names.EMBED], expected[names.EMBED], tolerance)
    for layer in layers:
        if layer.moe:
            name = chosen[layer.index]
            ours, theirs = expected[name], found[name]
            if theirs.shape != ours.shape:
                detail = f"{theirs.shape[1]} experts a token, where the spec says {ours.shape[1]}"
                label = f"{names.layer(layer.index)} router"
                yield Check(label, "agreement", 0.0, tolerance.agreement, detail)
                continue
            if tolerance.near is None:
                clear = _clear(expected[ranks[layer.index]], ours, tolerance)
            else:  # the reference has not followed the engine
                clear = (expected[names.taken(name)] != theirs).any(-1)
            same = (theirs == ours).all(-1)
            yield agreement(f"{names.layer(layer.index)} router", same, clear, tolerance)
        name = names.out(layer.index)
        yield error(names.layer(layer.index), found[name], expected[name], tolerance)
    a, b = found["logits"], expected["logits"]
    yield error("logits, all positions", a, b, tolerance)
    if not spec.fp8:  # FP8 may have sent all of these few tokens to other experts
        ends = lengths.cumsum(0) - 1
        yield error("logits, last token", a[ends], b[ends], tolerance)
    yield argmax_agreement("argmax", a, b, tolerance)
    chunk = spec.text.chunk
    if chunk and int(lengths.max()) > chunk:
        at = torch.arange(ids.shape[1]).expand_as(ids)[own]
        border = (at >= chunk) & ((at % chunk == 0) | (at % chunk == chunk - 1)) | (at == chunk - 1)
        detail = f"{int(border.sum())} positions beside {int((lengths.max() - 1) // chunk)} borders"
        yield error("logits, chunk borders", a[border], b[border], tolerance, detail)


def _clear(ranks: Tensor, ours: Tensor, tolerance: Tolerance) -> Tensor:
    """Which tokens have no near tie: bool [T].

    `ranks` [T, E] are what the reference chooses experts by; ours [T, k] are those that it chose.
    """
    best = ranks.topk(min(ours.shape[1] + 1, ranks.shape[1])).values
    largest = ranks[ranks.isfinite()].abs().max()
    return (-best.diff() > tolerance.error * largest).all(-1)


def _each_layer(
    tested: ArtefactUnderTest,
    ids: Tensor,
    lengths: Tensor,
    found: dict[str, Tensor],
) -> Iterator[Check]:
    """Compare every layer by itself: the reference gets the engine's own input of the layer.

    In bf16 the sum after attention is compared too, and the reference computes the rest of the
    layer from it: each rounding to bf16 sends values to other neighbours in FP8, and four or five
    products in a row, those of a whole layer, leave no room below a limit that sees faults.

    Where the rounding of a float32 sum decides between two values of FP8, the reference takes the
    engine's, if the engine shows it: attention would carry the other one to all later tokens.

    Two limits hold for each layer. The better half of the tokens has a tight limit. Most tokens
    have a loose one, because a rounding to FP8 may change some of them.
    """
    compute, hidden = tested.compute, [names.EMBED]
    found = dict(found)
    for layer in tested.artefact.manifest.spec.text.all_layers:
        added = names.attention(layer.index, "o")
        if compute == "bf16" and added in found:
            middle = names.attention(layer.index, "residual")
            found[middle] = found[hidden[-1]].float() + found[added].float()
            hidden.append(middle)
        hidden.append(names.out(layer.index))
    given = {name: found[name] for name in hidden}
    codes = {name: each for name, each in found.items() if each.dtype == FP8}
    expected = tested.reference_from(ids, lengths, given, hidden, codes)
    for name in (*hidden[1:], "logits"):
        label, a, b = names.title(name), found[name], expected[name]
        index = names.layer_of(name)
        chosen, limit = None, SAME_INPUTS[compute]
        if index is not None and name == names.out(index):
            chosen = found.get(names.chosen(index))
        elif index is not None:
            limit = SAME_INPUTS_ATTENTION
        yield worst_error(f"{label}, same inputs", a, b, chosen, limit)
        yield error(f"{label}, most tokens", a, b, SAME_INPUTS_MOST[compute])


def cached_decode(
    tested: ArtefactUnderTest, ids: Tensor, lengths: Tensor, tolerance: Tolerance
) -> Iterator[Check]:
    """Compare calls through the caches with one call, and a sequence in a batch with itself alone.

    The calls are uneven prefill chunks and decode steps around each chunk border; the sequences
    have different lengths.
    """
    routes = shown_choices(tested.artefact.manifest.spec, tolerance)
    session = tested.session(routes)  # the same one for the stages that follow
    reference = partial(tested.reference, near=tolerance.near)
    chunk = session.spec.text.chunk or 16
    whole = session.trace(ids, lengths, routes)
    cuts = {
        cut
        for border in range(chunk, ids.shape[1], chunk)
        for cut in (border - 2, border - 1, border, border + 1)
    } or {ids.shape[1] - 2, ids.shape[1] - 1}
    name = "prefill against decode"
    yield chunked_prefill(name, session, ids, lengths, cuts, whole, tolerance, reference)
    row, short = ids[1:2, : lengths[1]], lengths[1:2]
    within = {key: each[lengths[0] : lengths[:2].sum()] for key, each in whole.items()}
    alone = settled(reference, row, short, within, session.trace(row, short, routes))
    yield error("ragged batch against row alone", within["logits"], alone, tolerance)


def generation(tested: ArtefactUnderTest, ids: Tensor, tolerance: Tolerance) -> Iterator[Check]:
    """Generate greedily through the caches; each token must be near the reference's best one."""
    routes = shown_choices(tested.artefact.manifest.spec, tolerance)
    session, seen = watched(tested.session(routes), routes)
    prompt = ids[:1, : max(1, min(ids.shape[1] - 8, (session.spec.text.chunk or 16) - 4))]
    wanted = 32 if session.spec.fp8 else 8  # FP8 may change two tokens, too many of 8
    context = session.limits.context
    room = wanted if context is None else context - prompt.shape[1] + 1
    plain: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "stop": ()}
    tokens = session.generate(prompt, max_new_tokens=min(wanted, room), **plain)
    fed = tokens[:, :-1]
    lengths = torch.tensor([fed.shape[1]])
    followed = {name: torch.cat(each) for name, each in seen.items()}
    reference = following(tested.reference((), tolerance.near), followed, lengths)
    logits = reference.logits(fed)[0, prompt.shape[1] - 1 :]
    best = logits.max(-1).values
    given = logits.gather(1, tokens[0, prompt.shape[1] :, None])[:, 0]
    near = best - given <= tolerance.error * logits.abs().max()
    yield agreement("greedy tokens", near, torch.ones_like(near), tolerance)
