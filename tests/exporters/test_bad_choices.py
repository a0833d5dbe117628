"""A target, precision, placement or source that `export` does not know gives one clear message."""

import os
from pathlib import Path

import pytest

import moec
from moec.spec.errors import MoecError
from tests.refusals import refused_and_nothing_left
from tests.trees import tree


@pytest.mark.parametrize("bound", [True, False], ids=["checkpoint", "preset"])
@pytest.mark.parametrize(
    "choice",
    [
        {"target": "tpu"},
        {"precision": "int8", "target": "tensorrt-rtx"},
        {"weights": "pack", "target": "tensorrt"},
        {"precision": "nvfp4"},
        {"precision": "int4"},
        {"precision": ""},
        {"precision": "fp16", "scheme": "meta"},
        {"weights": "teleport"},
        {"weights": "teleport", "target": "ort"},
        {"weights": "pack"},
        {"weights": "in-place", "target": "ort", "precision": "int4"},
        {"weights": "copy", "target": "ort", "precision": "bf16"},
    ],
    ids=lambda choice: " ".join(f"{key}={value}" for key, value in choice.items()),
)
def test_an_unknown_choice_is_refused(
    sound: Path, tmp_path: Path, choice: dict[str, str], bound: bool
) -> None:
    source = sound if bound else "tiny-scout"
    key, value = next(iter(choice.items()))
    refused_and_nothing_left(
        tmp_path,
        lambda: moec.export(source, out=tmp_path / "out", **choice),
        f"--{key} {value}".strip(),
    )


@pytest.mark.parametrize(
    "source", ["herd", "gone.yaml", "gone/checkpoint", "", "x" * 5000, "zero\0byte"]
)
def test_an_unknown_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(MoecError) as caught:
        moec.export(source, out="out")
    assert caught.value.exit_code == 2
    assert tree(tmp_path) == before


def test_hard_links_across_file_systems_are_refused(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link", str(source))

    monkeypatch.setattr(os, "link", link)
    refused_and_nothing_left(
        tmp_path, lambda: moec.export(sound, out=tmp_path / "out", weights="link"), "--weights"
    )
