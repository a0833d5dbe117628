"""A command that writes one file replaces nothing but such a file of its own."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import run_command

CALIBRATE = ("calibrate", "{checkpoint}", "--tokens", "{tokens}", "--out")
VALIDATE = ("validate", "{artefact}", "--tokens", "8", "--html")


@pytest.fixture
def files(tiny: Path, tmp_path: Path) -> dict[str, Path]:
    shutil.copytree(tiny, tmp_path / "checkpoint")
    (tmp_path / "ids.json").write_text("[[1, 2, 3, 4]]")
    return {"checkpoint": tmp_path / "checkpoint", "tokens": tmp_path / "ids.json"}


@pytest.mark.parametrize("name", ["tokens", "checkpoint/config.json", "checkpoint", "none/x.json"])
def test_scales_replace_no_other_file(files: dict[str, Path], name: str, tmp_path: Path) -> None:
    out = files.get(name) or tmp_path / name
    before = out.read_bytes() if out.is_file() else None
    code, _, err = run_command(*(each.format(**files) for each in CALIBRATE), out)
    assert code == 2 and f"--out {out}" in err
    assert (out.read_bytes() if out.is_file() else None) == before


def test_a_page_replaces_no_other_file(tiny_onnx: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_onnx, tmp_path / "art")
    out = tmp_path / "art" / "manifest.json"
    before = out.read_bytes()
    code, _, err = run_command(*(each.format(artefact=tmp_path / "art") for each in VALIDATE), out)
    assert code == 2 and "something else" in err and out.read_bytes() == before


@pytest.mark.full
def test_a_page_replaces_an_earlier_one(tiny_onnx: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_onnx, tmp_path / "art")
    for _ in range(2):
        code, out, err = run_command(
            *(each.format(artefact=tmp_path / "art") for each in VALIDATE), tmp_path / "page.html"
        )
        assert code == 0 and "PASSED" in out, err


@pytest.mark.full
def test_a_command_replaces_what_it_wrote(files: dict[str, Path], tmp_path: Path) -> None:
    for _ in range(2):
        code, _, err = run_command(
            *(each.format(**files) for each in CALIBRATE), tmp_path / "scales.json"
        )
        assert code == 0, err
