"""Conversations on trained weights: each turn has the tokens of one call with the whole text."""

from pathlib import Path

import pytest

import moec
from tests.talks import check_five_turns, with_template

#: target -> precision, and the relative error of logits that other pieces of a prompt may make
TARGETS = {"onnx": ("fp32", 0.0), "ort": ("fp32", 0.0), "torch": ("fp8", 6e-2)}


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny, tmp_path_factory.mktemp("talks") / "checkpoint")


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_five_turns_are_one_call_with_the_whole_text(
    target: str, checkpoint: Path, tmp_path: Path
) -> None:
    precision, noise = TARGETS[target]
    built = moec.export(checkpoint, target=target, precision=precision, out=tmp_path / "a").path
    check_five_turns(moec.open_session(built), built, noise)


@pytest.mark.slow
def test_the_eager_reference_converses_on_a_checkpoint(checkpoint: Path) -> None:
    check_five_turns(moec.open_session(checkpoint), checkpoint)
