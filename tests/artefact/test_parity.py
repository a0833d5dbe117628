"""A report is filed on the artefact that was proven, whole or not at all."""

import errno
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.artefact import parity
from moec.artefact.artefact import check_digest, open_artefact, verify_files, write_manifest
from moec.artefact.manifest import NAME
from moec.artefact.parity import identity, record
from moec.runtime.proof.report import Check, Report
from moec.spec.errors import MoecError
from tests.conftest import run_command
from tests.damage import manifest, text
from tests.refusals import refusal
from tests.trees import tree

CHECK = Check("layers.0", "error", 0.0, 1e-4)


def report_on(art: Path, seed: int = 1) -> Report:
    found = Report(str(art), "onnxruntime", "eager fp32", "fp32", seed, [3], checks=[CHECK])
    return replace(found, identity=identity(open_artefact(art)))


def test_a_report_is_filed_and_the_digest_is_that_of_the_new_manifest(artefact: Path) -> None:
    record(artefact, report_on(artefact))
    record(artefact, report_on(artefact, seed=2))  # the first report is not part of the identity
    found = open_artefact(artefact)
    assert found.manifest.parity and found.manifest.parity["seed"] == 2
    assert NAME in verify_files(found).hashed
    moec.open_session(artefact)


@pytest.mark.parametrize(
    "options",
    [{"precision": "fp16", "weights": "copy"}, {"weights": "link"}, {"precision": "fp8"}],
    ids=str,
)
def test_a_report_is_not_filed_on_another_build(
    artefact: Path, checkpoint: Path, options: dict[str, str]
) -> None:
    report = report_on(artefact)
    moec.export(checkpoint, out=artefact, **options)
    before = tree(artefact)
    refusal(lambda: record(artefact, report), "/art")
    assert tree(artefact) == before


def test_a_report_is_filed_on_the_same_build_again(checkpoint: Path, tmp_path: Path) -> None:
    art = moec.export(checkpoint, out=tmp_path / "art", weights="copy").path
    report = report_on(art)
    moec.export(checkpoint, out=art, weights="copy")
    record(art, report)
    assert open_artefact(art).manifest.parity


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda art: text("model.onnx", b"\0" * (art / "model.onnx").stat().st_size)(art), 2),
        (manifest("opset", 23), 1),
    ],
    ids=["a graph", "the manifest"],
)
def test_a_report_is_not_filed_on_what_has_changed_since(
    artefact: Path, damage: Any, code: int
) -> None:
    report = report_on(artefact)
    damage(artefact)
    before = tree(artefact)
    refusal(lambda: record(artefact, report), "/art", code)
    assert tree(artefact) == before


def test_a_report_of_nothing_is_not_filed(artefact: Path) -> None:
    refusal(lambda: record(artefact, replace(report_on(artefact), identity=None)), "/art")


def test_a_build_that_replaces_the_folder_meanwhile_keeps_its_manifest(
    artefact: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = report_on(artefact)
    seen: dict[str, dict[str, str]] = {}

    def replaced(path: Path, values: Any, folder: int | None = None) -> object:
        moec.export(checkpoint, precision="fp16", out=path, weights="copy")
        seen["new"] = tree(path)
        return write_manifest(path, values, folder)

    monkeypatch.setattr(parity, "write_manifest", replaced)
    with pytest.raises(MoecError):
        record(artefact, report)
    assert tree(artefact) == seen["new"]


def test_reports_that_are_filed_at_once_leave_one_whole_manifest(artefact: Path) -> None:
    reports, done = [report_on(artefact, seed) for seed in range(4)], threading.Event()
    errors: list[BaseException] = []

    def file(report: Report) -> None:
        try:
            for _ in range(10):
                record(artefact, report)
        except BaseException as error:
            errors.append(error)

    def look() -> None:
        while not done.is_set():
            check_digest(open_artefact(artefact))

    threads = [threading.Thread(target=file, args=[each]) for each in reports]
    reader = threading.Thread(target=look)
    for each in (*threads, reader):
        each.start()
    for each in threads:
        each.join()
    done.set()
    reader.join()
    assert not errors
    assert verify_files(open_artefact(artefact)).not_hashed == (), "no draft is left"


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_report_that_cannot_be_stored_is_printed_and_counts(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, number: int, passed: bool
) -> None:
    found = replace(CHECK, found=0.0 if passed else 1.0)
    report = replace(report_on(artefact), checks=[found])
    monkeypatch.setattr(moec, "validate", lambda *_, **__: report)
    before, rename, opened = tree(artefact), os.rename, os.open

    def refused(*args: Any, **options: Any) -> Any:
        if options.get("dir_fd") is not None or options.get("src_dir_fd") is not None:
            raise OSError(number, os.strerror(number), NAME)
        return (rename if len(args) == 2 and isinstance(args[1], str) else opened)(*args, **options)

    monkeypatch.setattr(os, "rename" if number == errno.ENOSPC else "open", refused)
    code, out, err = run_command("validate", artefact)
    assert code == (0 if passed else 1)
    assert ("PASSED" if passed else "FAILED") in out
    assert "not stored" in err and os.strerror(number) in err and "Traceback" not in err
    assert tree(artefact) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into any folder")
def test_a_folder_that_cannot_be_written_keeps_its_manifest(artefact: Path) -> None:
    report = report_on(artefact)
    artefact.chmod(0o555)
    refusal(lambda: record(artefact, report), NAME)
    artefact.chmod(0o755)


@pytest.mark.full
def test_validate_says_which_artefact_it_proved(artefact: Path, tmp_path: Path) -> None:
    for reduced in (False, True):
        report = moec.validate(artefact, tokens=6, reduced=reduced)
        assert report.identity == identity(open_artefact(artefact))
    moved = Path(shutil.copytree(artefact, tmp_path / "moved"))
    record(moved, report)
