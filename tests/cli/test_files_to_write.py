"""A command that writes one file replaces nothing but such a file of its own."""

import os
import resource
import shutil
from pathlib import Path

import pytest

import moec
from moec.runtime.proof.report import Check, Report
from moec.spec.bounded.own import put_at
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


def test_a_file_that_cannot_be_finished_leaves_the_earlier_one(tmp_path: Path) -> None:
    out, link = tmp_path / "scales.json", tmp_path / "link"
    link.symlink_to(out)
    put_at(link, "earlier")
    assert out.read_text() == "earlier" and link.is_symlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # as of a disk that is full
    try:
        with pytest.raises(OSError):
            put_at(out, "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert out.read_text() == "earlier" and len(list(tmp_path.iterdir())) == 2
    put_at("/dev/null", "x")


def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path: Path) -> None:
    out = tmp_path / ("x" * 255)
    for text in ("one", "two"):
        put_at(out, text)
        assert out.read_text() == text
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_that_is_replaced_stays_as_private_as_it_was(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        put_at(out := tmp_path / "scales.json", "one")
        for mode in (0o644, 0o600, 0o640, 0o664):
            if mode != 0o644:
                out.chmod(mode)
            put_at(out, "two")
            assert out.stat().st_mode & 0o7777 == mode
        if os.getuid() == 0:
            os.chown(out, 12, 34)
            put_at(out, "three")
            assert (out.stat().st_uid, out.stat().st_gid) == (12, 34)
    finally:
        os.umask(before)


@pytest.mark.parametrize("found", [0.0, 2.0])
def test_a_proof_that_failed_says_so_whatever_becomes_of_its_page(
    found: float, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pages").mkdir()

    def validate(*_: object, **__: object) -> Report:
        (tmp_path / "pages").rmdir()
        check = Check("embed", "error", found, 1.0)
        return Report("art", "onnxruntime", "eager fp32", "fp32", 1, [3], checks=[check])

    monkeypatch.setattr(moec, "validate", validate)
    code, out, err = run_command("validate", built, "--html", tmp_path / "pages" / "page.html")
    assert "page.html" in err and "No such file" in err
    assert (code, "warning: the page" in err) == ((1, True) if found else (2, False))
    assert ("FAILED" if found else "PASSED") in out
