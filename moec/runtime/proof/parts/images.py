"""The checks of a proof that concern images: the vision tower, and images in text."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.runtime.engines.eager import eager_engine
from moec.runtime.proof.chunked_prefill import chunked_prefill
from moec.runtime.proof.compare import Tolerance, argmax_agreement, error
from moec.runtime.proof.each_op.table import checks_of
from moec.runtime.proof.each_op.watch import watch
from moec.runtime.proof.near_ties import choices, following
from moec.runtime.proof.report import Check
from moec.runtime.proof.under_test import ArtefactUnderTest
from moec.spec import names
from moec.spec.model import ModelSpec

#: the number of tiles in each sequence of the drawn text, if they fit
ROWS = (2, 1)


@dataclass(frozen=True, slots=True)
class Images:
    """Image tiles of noise, and text that contains some of them.

    Attributes:
        pixels: the tiles, [sum(ROWS), C, H, W].
        ids: the text, [B, S], with image tokens in its first two sequences.
        seen: which of these are image tokens, bool [B, S].
        placed: the number of tiles in the text.
    """

    pixels: Tensor
    ids: Tensor
    seen: Tensor
    placed: int


def draw_images(
    spec: ModelSpec, ids: Tensor, lengths: Tensor, generator: torch.Generator
) -> Images:
    """Draw tiles of noise, and put image tokens into two sequences of a copy of `ids` [B, S]."""
    vision, image = spec.vision, spec.tokens.image
    assert vision is not None and image is not None
    shape = (sum(ROWS), vision.channels, vision.image, vision.image)
    pixels = torch.rand(shape, generator=generator) * 2 - 1
    other = image + 1 if image == 0 else image - 1
    ids = ids.masked_fill(ids == image, other)
    placed = 0
    for row, most in enumerate(ROWS):
        length = int(lengths[row])
        count = min(most, max(0, length - 2) // vision.tokens)
        start = (length - count * vision.tokens) // 2
        ids[row, start : start + count * vision.tokens] = image
        placed += count
    return Images(pixels, ids, ids == image, placed)


def tower(tested: ArtefactUnderTest, pixels: Tensor, tolerance: Tolerance) -> Iterator[Check]:
    """Compare the vision tower stage by stage: patches, every layer, adapter, projector."""
    spec, entries = tested.artefact.manifest.spec, tested.entries()
    assert spec.vision is not None
    seen = watch(tested, "vision")
    seen.run(tested.open("vision", seen.taps), {})({names.PIXEL_VALUES: pixels})
    yield from checks_of(seen.found.values(), tolerance.error, "vision tower, ")
    shown = {
        names.vision("tokens"): names.vision("tokens"),
        **{names.vision_layer(i): names.vision_layer(i, "out") for i in range(spec.vision.layers)},
        names.vision("post"): names.vision("post"),
        names.vision("shuffle"): names.vision("shuffle"),
        names.vision("adapter"): names.vision("adapter", "fc2", "act"),
        names.IMAGE_FEATURES: names.IMAGE_FEATURES,
    }
    taps = [name for name in shown.values() if name != names.IMAGE_FEATURES]
    found, expected = (
        {name: each.cpu() for name, each in run({names.PIXEL_VALUES: pixels}).items()}
        for run in (
            tested.open("vision", taps),
            eager_engine(spec, entries, "fp32", taps, "vision"),
        )
    )
    for name, tap in shown.items():
        detail = f"{len(pixels)} tiles" if name == names.IMAGE_FEATURES else ""
        yield error(name, found[tap], expected[tap], tolerance, detail)


def fusion(
    tested: ArtefactUnderTest, images: Images, lengths: Tensor, tolerance: Tolerance
) -> Iterator[Check]:
    """Compare images in text: the embeddings with image features, the logits, and the caches."""
    pixels = images.pixels[: images.placed]
    spec = tested.artefact.manifest.spec
    routes = choices(spec, tolerance)
    session = tested.session([names.WITH_IMAGES, *routes])
    features = session.image_features(pixels)
    whole = session.trace(images.ids, lengths, [names.WITH_IMAGES, *routes], features)
    reference = tested.reference([names.WITH_IMAGES], tolerance.near)
    judged = following(reference, {name: whole[name] for name in routes}, lengths).trace(
        images.ids, lengths, [names.WITH_IMAGES], reference.image_features(pixels)
    )
    # Compare image tokens only: trained embeddings may be so large that they hide an error.
    own = torch.arange(images.ids.shape[1]) < lengths[:, None]
    seen = images.seen[own]
    found, expected = (out[names.WITH_IMAGES][seen] for out in (whole, judged))
    detail = f"{len(found)} image tokens of {images.placed} tiles"
    yield error("images: fused", found, expected, tolerance, detail)
    found, expected = whole["logits"], judged["logits"]
    yield error("images: logits", found, expected, tolerance)
    yield argmax_agreement("images: argmax", found, expected, tolerance)
    cuts = set()  # columns inside images
    for row in images.seen:
        columns = row.nonzero()[:, 0].tolist()
        cuts |= {columns[len(columns) // 3], columns[len(columns) // 2]} if columns else set()
    yield chunked_prefill(
        "images: in pieces", session, images.ids, lengths, cuts, whole, tolerance,
        lambda: reference, features,
    )  # fmt: skip
