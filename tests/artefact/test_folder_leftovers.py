"""A build removes what dead builds of its artefact left behind, and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moec
from moec.spec.errors import MoecError
from moec.weights.trust import leftovers
from tests.damage import NO_SPACE, raising
from tests.trees import assert_whole, names, tree


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["partial", "replaced"])
@pytest.mark.parametrize("name", ["art", "art[1]", "art 17B", "*", "art.v2"])
def test_leftovers_of_dead_processes_are_removed(
    checkpoint: Path, work: Path, old: Path, dead: int, name: str, kind: str
) -> None:
    shutil.copytree(old, work / name)
    leftover = work / f".{name}.moec-{kind}-{dead}"
    (leftover / "sub").mkdir(parents=True)
    (leftover / "sub" / "model.onnx").write_text("half")
    moec.export(checkpoint, out=work / name, weights="copy")
    assert names(work) == [name]
    assert_whole(work / name, checkpoint, "fp32")


def test_an_artefact_that_a_killed_build_had_moved_away_comes_back(
    checkpoint: Path, work: Path, old: Path, dead: int
) -> None:
    leftovers.record(shutil.copytree(old, work / f".art.moec-replaced-{dead}"))
    with pytest.raises(MoecError):
        moec.export(
            checkpoint, out=work / "art", weights="copy", progress=raising(NO_SPACE, "copy")
        )
    assert names(work) == ["art"]
    assert tree(work / "art") == tree(old)


def test_an_artefact_that_somebody_else_has_left_there_stays_where_it_is(
    checkpoint: Path, work: Path, old: Path, dead: int
) -> None:
    planted = shutil.copytree(old, work / f".art.moec-replaced-{dead}")
    (planted / "note.txt").write_text("a file of no artefact")
    before = tree(planted)
    with pytest.raises(MoecError):
        moec.export(
            checkpoint, out=work / "art", weights="copy", progress=raising(NO_SPACE, "copy")
        )
    assert names(work) == [planted.name]
    moec.export(checkpoint, out=work / "art", weights="copy")
    assert_whole(work / "art", checkpoint)
    assert tree(planted) == before


_KILLED = """
import os, sys
from pathlib import Path
import moec
rename = Path.rename
def renamed(path, name):
    if ".moec-partial-" in path.name:
        os.kill(os.getpid(), 9)
    return rename(path, name)
Path.rename = renamed
moec.export(sys.argv[1], out=sys.argv[2], weights="copy")
"""


def test_an_artefact_comes_back_after_a_kill_between_two_renames(
    checkpoint: Path, work: Path, old: Path
) -> None:
    shutil.copytree(old, work / "art")
    command = [sys.executable, "-c", _KILLED, str(checkpoint), str(work / "art")]
    assert subprocess.run(command, check=False).returncode == -9
    assert "art" not in names(work)
    with pytest.raises(MoecError):
        moec.export(
            checkpoint, out=work / "art", weights="copy", progress=raising(NO_SPACE, "copy")
        )
    assert names(work) == ["art"] and tree(work / "art") == tree(old)


def test_half_of_an_artefact_that_a_killed_build_was_removing_does_not_come_back(
    checkpoint: Path, work: Path, dead: int
) -> None:
    """`out` itself was removed by hand since."""
    leftover = work / f".art.moec-replaced-{dead}"
    leftover.mkdir()
    (leftover / "model.onnx").write_text("half")
    moec.export(checkpoint, out=work / "art", weights="copy")
    assert names(work) == ["art"]
    assert_whole(work / "art", checkpoint)


@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_leftovers_of_a_dead_process_of_our_own_id_are_removed(
    checkpoint: Path, work: Path, out: Path, kind: str
) -> None:
    """In containers every build may have the same process id."""
    leftover = work / f".art.moec-{kind}-{os.getpid()}"
    leftover.mkdir()
    (leftover / "model.onnx").write_text("half")
    moec.export(checkpoint, out=out, weights="copy")
    assert names(work) == ["art"]
    assert_whole(out, checkpoint, "fp32")


@pytest.mark.parametrize(
    "name",
    [
        f".art.moec-partial-{os.getppid()}",  # of a process that lives
        ".art2.moec-partial-DEAD",  # of another artefact
        ".art.moec-partial-mine",  # of nobody
        ".art.v2",
        "art.moec-partial-DEAD",
    ],
)
def test_what_is_no_leftover_is_left_alone(
    checkpoint: Path, work: Path, dead: int, name: str
) -> None:
    kept = work / name.replace("DEAD", str(dead))
    kept.mkdir()
    (kept / "file").write_text("mine")
    moec.export(checkpoint, out=work / "art", weights="copy")
    assert (kept / "file").read_text() == "mine"


def test_leftovers_are_not_found_by_a_name_that_is_a_pattern(
    checkpoint: Path, work: Path, dead: int
) -> None:
    kept = work / f".art1.moec-partial-{dead}"
    kept.mkdir()
    moec.export(checkpoint, out=work / "art[1]", weights="copy")
    assert kept.exists(), "it is art1's to remove, not art[1]'s"
