"""A build that replaces an artefact during its proof is named, and the new artefact left alone."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import moec
from moec.artefact.artefact import Artefact, open_artefact, write_manifest
from moec.artefact.manifest import NAME
from moec.runtime.proof.against import compare
from moec.runtime.proof.graph_files import graph_files
from moec.runtime.proof.report import Check
from moec.runtime.proof.validate import record, validate
from tests.conftest import run_command
from tests.proofs import assert_passed
from tests.refusals import one_message, refusal
from tests.trees import tree

Progress = Callable[[str, int, int], None]


@pytest.fixture
def new(sound: Path, tmp_path: Path) -> Path:
    """Another sound artefact, to take the place of `artefact`."""
    return moec.export(sound, precision="fp16", weights="copy", out=tmp_path / "new").path


def at(stage: str, change: Callable[[], None]) -> Progress:
    """A `progress` that makes a change when a stage begins."""

    def progress(name: str, done: int, total: int) -> None:
        if name == stage:
            change()

    return progress


def replace(art: Path, new: Path) -> None:
    art.rename(art.with_name("old"))
    new.rename(art)


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "reduced"),
    [
        ("each op", False),
        ("graph files", False),
        ("proof", False),
        ("graph files", True),
        ("each op", True),
    ],
)
def test_an_artefact_that_a_build_replaces_is_not_called_damaged(
    artefact: Path, new: Path, stage: str, reduced: bool
) -> None:
    before = tree(new)
    progress = at(stage, lambda: replace(artefact, new))
    call = partial(moec.validate, artefact, tokens=6, reduced=reduced, progress=progress)
    refusal(call, "another folder, put there by another command")
    assert tree(artefact) == before


def test_the_command_ends_with_one_message_and_writes_nothing(
    artefact: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(new)

    def replaced(opened: Artefact) -> Iterator[Check]:
        replace(artefact, new)
        return graph_files(opened)

    monkeypatch.setattr(f"{validate.__module__}.graph_files", replaced)
    code, _, err = run_command("validate", artefact, "--tokens", 6)
    assert code == 2
    one_message(err, "another command")
    assert tree(artefact) == before


def test_a_manifest_that_is_written_meanwhile_is_noticed(artefact: Path) -> None:
    def engines() -> None:  # `moec engine` writes it in place
        opened = open_artefact(artefact).manifest
        write_manifest(artefact, opened.model_copy(update={"versions": {}}))

    progress = at("each op", engines)
    refusal(lambda: moec.validate(artefact, tokens=6, progress=progress), NAME)


def test_another_proof_of_the_same_artefact_disturbs_nothing(artefact: Path) -> None:
    report = moec.validate(artefact, tokens=6)
    progress = at("each op", lambda: record(artefact, report))
    assert_passed(moec.validate(artefact, tokens=6, progress=progress))


def test_a_checkpoint_that_is_replaced_in_another_engine_s_proof_is_noticed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(*given: object) -> None:
        checkpoint.rename(checkpoint.with_name("old"))
        checkpoint.mkdir()

    monkeypatch.setattr(compare, "against", moved)
    refusal(lambda: moec.validate(checkpoint, against="transformers"), "another folder")
