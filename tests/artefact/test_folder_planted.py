"""A hidden folder that somebody else put beside `out` gives a build nothing and costs no file."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import moec
from moec.artefact.folder import writing
from moec.spec.hf.forms import SINGLE
from moec.weights.packed.journal import PACKED, journal_of
from moec.weights.trust import leftovers, records
from tests.trees import names, tree

JOURNAL = f"{PACKED}.journal"
DEAD = (1 << 22) + 1  # no process of Linux has this id


class Stop(BaseException):
    """What stops a build half-way, as Ctrl-C does."""


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Files of the user, in a folder of their own."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.odt").write_text("line 1\nline 2\n")
    return folder


def _half(folder: Path, data: bytes = b"half", journal: str = "a\nb\n") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / PACKED).write_bytes(data)
    (folder / JOURNAL).write_text(journal)
    return folder


def _replace(name: str, by: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    """A half-written folder in which file `name` is a link to the user's file."""

    def plant(leftover: Path, victim: Path) -> None:
        _half(leftover)
        (leftover / name).unlink()
        by(leftover / name, victim / "thesis.odt")

    return plant


def _folder_link(leftover: Path, victim: Path) -> None:
    _half(victim)
    leftover.symlink_to(victim)


def _deep_link(leftover: Path, victim: Path) -> None:
    _half(leftover)
    (leftover / "sub").symlink_to(victim)


PLANTS = {
    "weights are a link": _replace(PACKED, Path.symlink_to),
    "weights are a hard link": _replace(PACKED, Path.hardlink_to),
    "journal is a link": _replace(JOURNAL, Path.symlink_to),
    "journal is a hard link": _replace(JOURNAL, Path.hardlink_to),
    "the folder is a link": _folder_link,
    "a folder in it is a link": _deep_link,
}


@pytest.mark.parametrize("recorded", [False, True], ids=["unknown", "recorded"])
@pytest.mark.parametrize("number", [DEAD, os.getpid(), "0"], ids=["dead", "own id", "set aside"])
@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_no_leftover_leads_out(
    work: Path,
    victim: Path,
    plant: Callable[[Path, Path], None],
    number: object,
    recorded: bool,
) -> None:
    """Even in a folder that this user's build has recorded, links are not followed."""
    leftover = work / f".art.moec-partial-{number}"
    plant(leftover, victim)
    if recorded and not leftover.is_symlink():
        leftovers.record(leftover)
    before = tree(victim)
    with writing(work / "art") as partial:
        assert recorded or names(partial) == []
        assert all(each.lstat().st_nlink == 1 and each.is_file() for each in partial.iterdir())
        assert not any(each.is_symlink() for each in partial.iterdir())
        for name in (PACKED, JOURNAL):
            (partial / name).write_text("mine")
    assert tree(victim) == before
    assert names(work / "art") == [PACKED, JOURNAL]
    left = [name for name in names(work) if name != "art"]
    assert all((work / name).is_symlink() for name in left)


@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_a_link_is_no_artefact_that_comes_back(work: Path, old: Path, kind: str) -> None:
    (work / f".art.moec-{kind}-{DEAD}").symlink_to(old)
    before = tree(old)
    with pytest.raises(Stop), writing(work / "art"):
        raise Stop
    assert not (work / "art").exists() and tree(old) == before


def _stopped(out: Path) -> Path:
    """What a build leaves that is stopped when a weight is on disk."""
    with pytest.raises(Stop), writing(out) as partial:
        _half(partial)
        raise Stop
    return partial


def test_only_what_this_user_recorded_is_taken_over(work: Path) -> None:
    left = _stopped(work / "art")
    assert names(left) == [PACKED, JOURNAL]
    copy = shutil.copytree(left, work / f".other.moec-partial-{DEAD}")
    with writing(work / "art") as partial:
        assert names(partial) == [PACKED, JOURNAL]
    with writing(work / "other") as partial:
        assert names(partial) == [], "the same bytes, which an archive may hold"
    assert not copy.exists()


def test_what_was_moved_or_put_in_its_place_is_not_taken_over(work: Path) -> None:
    left = _stopped(work / "art")
    left.rename(work / f".art.moec-partial-{DEAD}")
    _half(left)
    with writing(work / "art") as partial:
        assert names(partial) == []


def _records(work: Path) -> int:
    """The number of folders in `work` that are recorded."""
    state = records.state_folder()
    assert state is not None
    found = [each.read_bytes() for each in (state / "allowed" / "partial").iterdir()]
    return sum(os.fsencode(os.path.realpath(work)) in each for each in found)


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_a_record_goes_with_its_folder(work: Path, fails: bool) -> None:
    for _ in range(2):
        with suppress(ValueError), writing(work / "art"):
            assert _records(work) == 1
            if fails:
                raise ValueError
        assert _records(work) == 0
        _stopped(work / "other")
        assert _records(work) == 1
        with writing(work / "other"):
            pass
        assert _records(work) == 0
        shutil.rmtree(work / "other")
        shutil.rmtree(work / "art", ignore_errors=True)


def test_without_a_state_folder_a_build_starts_anew(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/moec-state")
    _stopped(work / "art")
    monkeypatch.setattr(records, "_here", set())  # as in another process
    with writing(work / "art") as partial:
        assert names(partial) == []
    assert names(work) == ["art"]


@pytest.mark.full
def test_forged_weights_get_into_no_build(
    checkpoint: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal and the sources are right; only the packed bytes are another's."""
    monkeypatch.setattr("moec.weights.packed.file.JOURNAL_BYTES", 1)
    fresh = moec.export(checkpoint, precision="fp8", out=tmp_path / "fresh")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "pack" and done == total:
            raise Stop

    with pytest.raises(Stop):
        moec.export(checkpoint, precision="fp8", out=work / "art", progress=stop)
    (left,) = work.iterdir()
    forged = Path(shutil.copytree(left, work / f".mine.moec-partial-{DEAD}"))
    data = bytearray((forged / SINGLE).read_bytes())
    data[len(data) // 2 : -4096] = bytes(each ^ 0x55 for each in data[len(data) // 2 : -4096])
    (forged / SINGLE).write_bytes(data)
    assert journal_of(forged / SINGLE).read_bytes().count(b"\n") > 1
    mine = moec.export(checkpoint, precision="fp8", out=work / "mine")
    assert (mine.path / SINGLE).read_bytes() == (fresh.path / SINGLE).read_bytes()
    assert mine.manifest.build.bytes_read == fresh.manifest.build.bytes_read, "all of it"
