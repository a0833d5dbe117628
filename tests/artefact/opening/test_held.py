"""A folder that was replaced while a block held it is named, and not what the block met there."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moec.artefact.artefact import open_artefact, write_manifest
from moec.artefact.manifest import NAME
from moec.artefact.opening.held import held
from moec.artefact.parity import record
from tests.artefact.test_parity import report_on
from tests.damage import manifest
from tests.refusals import refusal


def _another_folder(art: Path) -> None:
    new = Path(shutil.copytree(art, art.with_name("new")))
    art.rename(art.with_name("old"))
    new.rename(art)


def _another_manifest(art: Path) -> None:
    opened = open_artefact(art).manifest
    write_manifest(art, opened.model_copy(update={"versions": {"moec": "0"}}))


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another folder": (_another_folder, "another folder"),
    "no folder": (shutil.rmtree, "no folder any more"),
    "another manifest": (_another_manifest, NAME),
    "no manifest": (lambda art: (art / NAME).unlink(), NAME),
    "broken manifest": (lambda art: (art / NAME).write_text("{"), NAME),
}


def _hold(art: Path, change: Callable[[Path], Any], error: type[BaseException] | None) -> None:
    with held(art):
        change(art)
        if error:
            raise error


@pytest.mark.parametrize("error", [None, KeyError])
@pytest.mark.parametrize("name", CHANGES)
def test_what_was_replaced_is_refused_whatever_the_block_met(
    artefact: Path, name: str, error: type[BaseException] | None
) -> None:
    change, names = CHANGES[name]
    found = refusal(partial(_hold, artefact, change, error), names)
    assert "another command" in found.found


def test_an_interrupt_stays_one(artefact: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _hold(artefact, _another_folder, KeyboardInterrupt)


def test_an_error_stays_that_of_the_block_where_nothing_was_replaced(artefact: Path) -> None:
    with pytest.raises(KeyError):
        _hold(artefact, lambda art: None, KeyError)


def test_the_report_of_a_proof_replaces_nothing(artefact: Path) -> None:
    _hold(artefact, lambda art: record(art, report_on(art)), None)
    manifest("digest", None)(artefact)  # as older versions wrote it
    _hold(artefact, lambda art: record(art, report_on(art)), None)
