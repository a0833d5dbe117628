"""A checkpoint that cannot be bound gives one clear message, and is never written to."""

import contextlib
from pathlib import Path

import pytest

import moec
from moec.spec.errors import MoecError
from tests.damage import SPEC, shard_called
from tests.refusals import refused_and_nothing_left
from tests.trees import tree


def test_bind_does_not_replace_the_folder_that_holds_its_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    art = moec.export(SPEC, out=tmp_path / "art").path
    checkpoint.rename(art / "checkpoint")
    refused_and_nothing_left(tmp_path, lambda: moec.bind(art, art / "checkpoint"), "/art")


def test_bind_refuses_a_checkpoint_of_another_model(checkpoint: Path, tmp_path: Path) -> None:
    art = moec.export("tiny-scout", out=tmp_path / "art").path
    refused_and_nothing_left(tmp_path, lambda: moec.bind(art, checkpoint), "text.dim")


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "config.json.safetensors"])
def test_hard_links_never_write_to_the_checkpoint(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    art = moec.export(checkpoint, out=tmp_path / "art").path
    shard_called(name)(checkpoint)
    before = tree(checkpoint)
    with contextlib.suppress(MoecError):
        moec.bind(art, checkpoint, weights="link")
    assert tree(checkpoint) == before
