"""A folder with the index of the base and the tune's model.safetensors: the user says which."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import moec
from moec.weights.checkpoint import read_checkpoint
from moec.weights.name_map import read_model
from tests.damage import EMBED, FIRST, INDEX, SECOND
from tests.refusals import refusal

SINGLE = "model.safetensors"
IDS = [[1, 2, 3, 4, 5]]


@pytest.fixture
def both(checkpoint: Path) -> Path:
    """A checkpoint in shards, and a tune of it in one file."""
    held = {
        key: each for name in (FIRST, SECOND) for key, each in load_file(checkpoint / name).items()
    }
    held[EMBED] = held[EMBED].flip(0).contiguous()
    save_file(held, checkpoint / SINGLE)
    return checkpoint


def test_two_lists_are_refused_with_the_name_that_chooses(both: Path) -> None:
    error = refusal(lambda: read_model(both), INDEX)
    assert SINGLE in error.found and f"name that file, such as {both / SINGLE}" in error.next_step


def test_an_index_of_the_single_file_is_no_second_list(checkpoint: Path, both: Path) -> None:
    text = (both / INDEX).read_text().replace(FIRST, SINGLE).replace(SECOND, SINGLE)
    (both / INDEX).write_text(text)
    assert {shard.name for shard in read_checkpoint(both).shards} == {SINGLE}


@pytest.mark.full
def test_the_chosen_list_is_built_proven_and_opened(both: Path, tmp_path: Path) -> None:
    logits = {}
    for name in (SINGLE, INDEX):
        built = moec.export(both / name, out=tmp_path / f"art-{name}")
        assert built.manifest.checkpoint == str(both.resolve() / name)
        assert built.checkpoint == both.resolve() / name
        report = moec.validate(built.path)
        assert report.passed and not any("not compared" in note for note in report.notes)
        logits[name] = moec.open_session(built.path).logits(IDS)
        eager = moec.open_session(both / name).logits(IDS)
        np.testing.assert_allclose(eager, logits[name], atol=1e-4)
    assert not np.allclose(logits[SINGLE], logits[INDEX])
