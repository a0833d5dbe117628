"""The stage of a proof that compares every op of the decoder, in calls that reach all of it."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moec.graph_builder.passes.follow_codes import quantised_tokens
from moec.runtime.proof.compare import Tolerance
from moec.runtime.proof.each_op.reach import (
    each_expert,
    expert_inputs,
    far_positions,
    ring_wrap,
    vocabulary,
    with_images,
)
from moec.runtime.proof.each_op.table import checks_of
from moec.runtime.proof.each_op.watch import Watch, watch
from moec.runtime.proof.report import Check
from moec.runtime.proof.under_test import ArtefactUnderTest
from moec.spec import names
from moec.spec.model import ModelSpec
from moec.spec.parameters import counts

#: the arithmetic that `vocabulary` may cost, in multiplications and additions
VOCABULARY_COST = 1 << 35
#: the fewest tokens that it runs, if the vocabulary has so many
FEWEST_TOKENS = 512


def every_op(
    tested: ArtefactUnderTest,
    ids: Tensor,
    lengths: Tensor,
    tolerance: Tolerance,
    generator: torch.Generator,
    notes: list[str],
    traced: dict[str, Tensor],
) -> Iterator[Check]:
    """Compare every value of the decoder that the engine shows, over several kinds of calls.

    The calls are: sequences of different length that pass a chunk border; single tokens at
    positions up to the last; image features in text; tokens of the whole vocabulary; and tokens
    for each expert. `notes` gets a remark on what was reached. The values of ids [B, S] in one
    call, [tokens, ...] without padding, are left in `traced` by name; of FP8 also what
    attention adds and the quantised inputs of products, as far as the engine shows them.
    """
    spec = tested.artefact.manifest.spec
    seen = watch(tested)
    session = tested.session(seen.taps)
    after = [names.attention(layer.index, "o") for layer in spec.text.all_layers]
    fp8 = [*after, *quantised_tokens(seen.graph)] if spec.fp8 else []
    more = [name for name in fp8 if name in seen.taps]
    traced |= session.trace(ids, lengths, [*shown_layers(spec), *more])
    ring_wrap(seen.on(session), session.limits.context or 2 * ids.shape[1], generator)
    last = far_positions(seen, session, generator)
    if spec.vision:
        with_images(seen.on(session), generator)
    embeddings = replace(seen, only={names.EMBED})
    most = max(FEWEST_TOKENS, VOCABULARY_COST // counts(spec)["active_text"])
    embedded = vocabulary(embeddings.on(session), most, generator)
    seen.found = embeddings.found
    del session  # its weights may fill the memory
    unreached = _experts(tested, seen, generator)
    # Roundings to FP8 make noise that no fixed ceiling fits.
    most_error = math.inf if spec.fp8 else tolerance.error
    yield from checks_of(seen.found.values(), most_error)
    experts = f", each expert but {unreached}" if unreached else ", each expert"
    notes.append(
        f"Each op was compared with float64 on the engine's own inputs: {len(seen.found)} values, "
        f"positions up to {last}, {embedded} of {spec.text.vocab} embeddings"
        + (f"{experts}." if spec.text.experts else ".")
    )


def shown_layers(spec: ModelSpec) -> list[str]:
    """The values that a comparison layer by layer needs: outputs, ranks and choices of experts."""
    layers = spec.text.all_layers
    routed = [layer for layer in layers if layer.moe]
    return [
        names.EMBED,
        *(names.out(layer.index) for layer in layers),
        *(layer.ranked_by for layer in routed),
        *(names.chosen(layer.index) for layer in routed),
    ]


def _experts(tested: ArtefactUnderTest, seen: Watch, generator: torch.Generator) -> int:
    given, missed = expert_inputs(
        tested.artefact.manifest.spec, tested.compute, seen.graph, generator
    )
    if given and tested.engine.gives:
        each_expert(seen, tested.session(seen.taps, list(given)), given, generator)
    return missed
