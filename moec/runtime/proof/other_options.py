"""Compare the sets of session options that users may choose with the set that a proof runs."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from moec.artefact.session_options import EXACT, SETS
from moec.runtime.memory import available
from moec.runtime.proof.compare import FAST_PRODUCTS, Tolerance, argmax_agreement, error
from moec.runtime.proof.near_ties import settled, shown_choices
from moec.runtime.proof.report import Check
from moec.runtime.proof.under_test import ArtefactUnderTest
from moec.spec.parameters import parameters


def other_options(
    tested: ArtefactUnderTest, ids: Tensor, lengths: Tensor, tolerance: Tolerance, notes: list[str]
) -> Iterator[Check]:
    """Compare one call of ids [B, S] under each other set of session options.

    If the proof ran `exact`, the products of the other sets round activations to int8, and the
    limits are wider. Options that need more memory than is free do not run: `notes` says so.
    """
    rounds = tested.options == EXACT
    limits = FAST_PRODUCTS if rounds else tolerance
    spec = tested.artefact.manifest.spec
    routes = [] if rounds else shown_choices(spec, tolerance)
    whole = tested.session(routes).trace(ids, lengths, routes)
    reference = partial(tested.reference, near=tolerance.near)
    for options in SETS:
        if options == tested.options:
            continue
        # only `fast` may hold all weights in float32
        needed = 4 * sum(map(math.prod, parameters(spec).values())) if options == "fast" else 0
        free = available(tested.device)
        if needed > free:
            notes.append(
                f"The session options {options} were not compared: they may take "
                f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free."
            )
            continue
        session = replace(tested, options=options).session(routes)
        found = session.trace(ids, lengths, routes)
        expected = settled(reference, ids, lengths, found, whole) if routes else whole["logits"]
        words = ["int8 activations"] * rounds + [f"session options {options}"]
        what = words[0] if options == "lean" else ", ".join(words)
        yield error(f"logits, {what}", found["logits"], expected, limits)
        yield argmax_agreement(f"argmax, {what}", found["logits"], expected, limits)
