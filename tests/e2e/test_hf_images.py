"""Random models with images in their text, both engines, against transformers in float32."""

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import Llama4ForConditionalGeneration

import moec
from moec.runtime.cache import new_cache
from moec.runtime.session import Session
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.oracle import relative, routers_are_clear, transformers_logits
from tests.strategies import vision_specs

pytestmark = pytest.mark.full

RELATIVE = 1e-4
#: a row of text: numbers of tokens, with an image of so many tiles before each but the first
ROWS = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9)))),
    min_size=1,
    max_size=3,
)
Plan = list[tuple[int, list[tuple[int, int]]]]
MIXED: Plan = [(4, [(3, 2), (1, 5)]), (9, []), (1, [(1, 0), (2, 1)])]


def _preset(name: str, image: int = 3) -> ModelSpec:
    spec = reduced(PRESETS[name])
    tokens = spec.tokens.model_copy(update={"image": image, "bos": 3})
    vision = spec.vision
    assert vision is not None
    return spec.model_copy(
        update={
            "tokens": tokens,
            "text": spec.text.model_copy(update={"layers": 8}),
            # transformers ties these widths to each other
            "vision": vision.model_copy(update={"layers": 4, "hidden": vision.shuffled_dim}),
        }
    )


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spec=vision_specs(),
    seed=st.integers(0, 2**31),
    plan=ROWS,
    cuts=st.lists(st.integers(1, 60), max_size=4),
)
@example(spec=_preset("scout"), seed=1, plan=MIXED, cuts=[3, 5, 6, 20])
@example(spec=_preset("maverick"), seed=2, plan=MIXED, cuts=[7, 8, 9])
@example(spec=_preset("scout", image=0), seed=3, plan=MIXED, cuts=[5])
def test_images_in_text_agree(spec: ModelSpec, seed: int, plan: Plan, cuts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_checkpoint(spec, folder / "weights", seed)
        rows, tiles = _draw(spec, plan, torch.Generator().manual_seed(seed))
        assume(routers_are_clear(folder / "weights", rows, tiles))
        expected = transformers_logits(folder / "weights", rows, tiles)
        pixels = torch.cat(tiles) if sum(map(len, tiles)) else None
        moec.export(folder / "weights", out=folder / "artefact")
        for engine in ("eager", "onnxruntime"):
            session = moec.open_session(folder / "artefact", engine=engine)
            if pixels is not None:
                _check_features(session, folder / "weights", pixels)
            # The padding is an image token, which must not be taken for one of the row's own.
            ids, lengths = _padded(rows, spec.tokens.image or 0)
            logits = session.logits(ids, pixels, lengths=lengths)
            for got, row, want in zip(logits, rows, expected, strict=True):
                assert relative(got[: len(row)], want) < RELATIVE
            _check_pieces(session, ids, lengths, pixels, expected, cuts)


def _draw(
    spec: ModelSpec, plan: Plan, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    vision, image = spec.vision, spec.tokens.image
    assert vision is not None and image is not None
    rows, tiles = [], []

    def words(count: int) -> Tensor:
        drawn = torch.randint(0, spec.text.vocab, (count,), generator=generator)
        return drawn.masked_fill(drawn == image, (image + 1) % spec.text.vocab)

    for first, images in plan:
        parts, count = [words(first)], 0
        for number, after in images:
            parts += [torch.full((number * vision.tokens,), image), words(after)]
            count += number
        rows.append(torch.cat(parts))
        shape = (count, vision.channels, vision.image, vision.image)
        tiles.append(torch.rand(shape, generator=generator) * 2 - 1)
    return rows, tiles


def _padded(rows: list[Tensor], filler: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = [functional.pad(row, (0, longest - len(row)), value=filler) for row in rows]
    return torch.stack(ids), torch.tensor([len(row) for row in rows])


def _check_features(session: Session, folder: Path, pixels: Tensor) -> None:
    model = Llama4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        seen = model.vision_model(pixels).last_hidden_state
        expected = model.multi_modal_projector(seen).flatten(0, 1)
    assert relative(session.image_features(pixels), expected) < RELATIVE


def _check_pieces(
    session: Session,
    ids: Tensor,
    lengths: Tensor,
    pixels: Tensor | None,
    expected: list[Tensor],
    cuts: list[int],
) -> None:
    """The same in pieces through the caches, that cut images and rows apart."""
    own = torch.arange(ids.shape[1]) < lengths[:, None]
    seen = own & (ids == session.spec.tokens.image)
    features = None if pixels is None else session.image_features(pixels)
    order = (seen.flatten().cumsum(0) - 1).view_as(ids)
    cache = new_cache(session.spec, session.precision, len(ids), 1)
    edges = [0, *sorted({cut for cut in cuts if cut < ids.shape[1]}), ids.shape[1]]
    for start, end in pairwise(edges):
        count = (lengths - start).clamp(0, end - start)
        part = None if features is None else features[order[:, start:end][seen[:, start:end]]]
        got = session.extend(ids[:, start:end], count, cache, part)
        for index, number in enumerate(count.tolist()):
            if number:
                assert relative(got[index], expected[index][start + number - 1]) < RELATIVE
