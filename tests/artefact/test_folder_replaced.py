"""A build takes a free place, an empty folder, or that of an older artefact as a whole."""

import shutil
import threading
from functools import partial
from pathlib import Path

import pytest

import moec
from moec.artefact.artefact import open_artefact
from moec.artefact.folder import writing
from tests.refusals import refusal
from tests.trees import assert_whole, names, tree


@pytest.mark.parametrize("weights", ["in-place", "link", "copy"])
def test_a_build_replaces_an_artefact_and_nothing_of_the_old_one_stays(
    checkpoint: Path, work: Path, old: Path, weights: str
) -> None:
    art = Path(shutil.copytree(old, work / "art"))
    moec.export(checkpoint, precision="fp32", out=art, weights=weights)
    assert names(work) == ["art"]
    manifest = open_artefact(art).manifest
    assert (manifest.precision, manifest.weights.mode) == ("fp32", weights)
    shards = set() if weights == "in-place" else set(manifest.weights.shards)
    assert set(tree(art)) == {"manifest.json", *manifest.files, *shards}


def test_an_empty_folder_is_taken(checkpoint: Path, work: Path) -> None:
    (work / "art").mkdir()
    moec.export(checkpoint, out=work / "art", weights="copy")
    assert_whole(work / "art", checkpoint)


def test_folders_on_the_way_to_out_are_made(checkpoint: Path, work: Path) -> None:
    moec.export(checkpoint, out=work / "by" / "date" / "art", weights="copy")
    assert_whole(work / "by" / "date" / "art", checkpoint)


def test_the_folder_one_stands_in_can_be_out(
    checkpoint: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "art").mkdir()
    monkeypatch.chdir(work / "art")
    moec.export(checkpoint, out=".", weights="copy")
    assert_whole(work / "art", checkpoint)


@pytest.mark.parametrize("way", ["the same", "through a link"])
def test_a_second_thread_is_refused_and_takes_nothing_away(
    checkpoint: Path, work: Path, old: Path, way: str
) -> None:
    """It would take the first one's temporary folder for a leftover."""
    out = Path(shutil.copytree(old, work / "art"))
    (work.parent / "link").symlink_to(work)
    same = out if way == "the same" else work.parent / "link" / "art"
    refused = []

    def second() -> None:
        call = partial(moec.export, checkpoint, precision="bf16", out=same, weights="copy")
        refused.append(refusal(call, "another thread"))

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "write" and not refused:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    moec.export(checkpoint, precision="fp32", out=out, weights="copy", progress=progress)
    assert len(refused) == 1
    assert names(work) == ["art"]
    assert_whole(out, checkpoint, "fp32")


def test_a_folder_is_free_again_after_a_failure(work: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), writing(work / "art"):
            raise KeyError
    with writing(work / "art") as draft, writing(work / "beside"):
        refusal(writing(work / "art").__enter__, "another thread")
        assert draft.is_dir()
    assert names(work) == ["art", "beside"]
