"""Conversations on trained weights: each turn has the tokens of one call with the whole text."""

from pathlib import Path

import pytest
import torch

import moec
from moec.runtime.cache import take_back
from moec.runtime.session import Session
from tests.talks import check_five_turns, with_template

pytestmark = pytest.mark.full

CHUNK = 128
#: target -> precision, and the relative error of logits that other pieces of a prompt may make
TARGETS = {"onnx": ("fp32", 0.0), "ort": ("fp32", 0.0), "torch": ("fp8", 6e-2)}


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny, tmp_path_factory.mktemp("talks") / "checkpoint")


@pytest.fixture(scope="module")
def session(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Session:
    precision, _ = TARGETS[request.param]
    out = tmp_path_factory.mktemp("talks") / "art"
    art = moec.export(checkpoint, target=request.param, precision=precision, out=out)
    return moec.open_session(art.path)


@pytest.mark.parametrize(
    "session", ["onnx", "ort", pytest.param("torch", marks=pytest.mark.slow)], indirect=True
)
def test_five_turns_are_one_call_with_the_whole_text(session: Session) -> None:
    assert session.artefact
    noise = TARGETS[session.artefact.manifest.target][1]
    check_five_turns(session, session.artefact.path, noise)


@pytest.mark.parametrize(
    "held, count, kept",
    [
        (CHUNK, 100, 100),  # the ring is full
        (CHUNK + 1, 100, 0),  # its first slot was overwritten
        (300, 2 * CHUNK, 2 * CHUNK),  # the ring has nothing that is needed
        (300, 200, CHUNK),
    ],
)
@pytest.mark.parametrize("session", ["onnx", "ort"], indirect=True)
def test_a_cache_that_was_taken_back_goes_on(
    held: int, count: int, kept: int, session: Session, golden: dict[str, torch.Tensor]
) -> None:
    ids, other = golden["eval_ids"][:2, :held].split(1)
    _, cache = session.prefill(ids, capacity=held)
    assert take_back(cache, count, session.spec.text) == kept == int(cache.lengths)
    row = torch.cat([ids[:, :count], other[:, :40]], 1)
    found = session.extend(row[:, kept:], torch.tensor([row.shape[1] - kept]), cache)
    expected, _ = session.prefill(row)
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.slow
def test_the_eager_reference_converses_on_a_checkpoint(checkpoint: Path) -> None:
    check_five_turns(moec.open_session(checkpoint), checkpoint)
