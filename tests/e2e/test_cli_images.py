"""`generate --image` with what does not fit: one message."""

from collections.abc import Callable
from pathlib import Path

import pytest

import moec
from tests.conftest import ROOT, TINY
from tests.refusals import one_message

PHOTO = ROOT / "examples" / "astronaut.jpg"
Cli = Callable[..., tuple[int, str]]


#: what is typed after `generate ARTEFACT`, and what the message names
REFUSED = {
    "no such file": ("--prompt hello --image gone.png", "gone.png"),
    "no image": ("--prompt hello --image README.md", "README.md"),
    "a folder": ("--prompt hello --image docs", "a folder"),
    "with ids": ("--ids 1 --image examples/astronaut.jpg", "--image with --ids"),
    "more marks than images": (
        "--prompt <|image|><|image|> --image examples/astronaut.jpg",
        "2 <|image|> in the text, 1 images",
    ),
    "image tokens in the text": (
        "--prompt <|patch|> --image examples/astronaut.jpg",
        "5 <|patch|>",
    ),
    "no template": ("--prompt a --chat --image examples/astronaut.jpg", "no chat template"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_ends_with_one_message(
    cli: Cli, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(ROOT)
    words, names = REFUSED[case]
    code, err = cli("generate", tiny_onnx, *words.split())
    one_message(err, names)
    assert code == 2


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "processor_config.json", "tokenizer.json"]
)
def test_broken_files_beside_the_weights_end_with_one_message(
    cli: Cli, tmp_path: Path, name: str
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for file in TINY.iterdir():
        (weights / file.name).write_bytes(file.read_bytes())
    (weights / name).write_text('{"image_processor": 3' if "config" in name else "{}")
    artefact = moec.export(weights, out=tmp_path / "artefact").path
    code, err = cli("generate", artefact, "--prompt", "a", "--image", PHOTO)
    one_message(err, name)
    assert code == 2
