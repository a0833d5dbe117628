"""Links lead out of a folder only to where this user allows it; a download cache is one folder."""

import os
from pathlib import Path

import pytest

from moec.spec.bounded.own import is_regular
from moec.spec.errors import MoecError
from moec.weights.checkpoint import read_checkpoint
from moec.weights.trust import records
from moec.weights.trust.links import reachable
from tests.damage import FIRST
from tests.refusals import refusal


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(records, "_here", set())


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder `art`, a file outside it, and a download cache."""
    for folder in ("art/sub", "other", "hub/snapshots/rev/genai", "hub/blobs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "other" / "file").write_text("mine")
    (tmp_path / "hub" / "blobs" / "hash").write_text("bytes")
    return tmp_path


def _link(path: Path, to: str | Path) -> Path:
    path.symlink_to(to)
    return path


def test_links_inside_the_folder_are_followed(world: Path) -> None:
    (world / "art" / "sub" / "x").write_text("x")
    real = (world / "art" / "sub" / "x").resolve()
    assert reachable(_link(world / "art" / "y", "sub/x"), world / "art") == real
    assert reachable(_link(world / "art" / "sub" / "z", "../y"), world / "art") == real


@pytest.mark.parametrize("to", ["../other/file", "/etc/passwd", "../other", "/", "../other/gone"])
def test_links_out_of_the_folder_are_not(world: Path, to: str) -> None:
    assert reachable(_link(world / "art" / "x", to), world / "art") is None


def test_links_through_links_and_folders_are_resolved(world: Path) -> None:
    _link(world / "art" / "folder", "../other")
    assert reachable(world / "art" / "folder" / "file", world / "art") is None
    _link(world / "other" / "back", "file")
    assert reachable(_link(world / "art" / "x", "../other/back"), world / "art") is None
    _link(world / "way", "art")  # the folder itself may be named by a link
    (world / "art" / "y").write_text("y")
    assert reachable(world / "way" / "y", world / "way")


def test_a_folder_that_the_user_names_or_recorded_is_allowed(world: Path) -> None:
    link = _link(world / "art" / "x", "../other/file")
    assert reachable(link, world / "art", world / "other")
    assert reachable(link, world / "art", world / "hub") is None
    records.allow_folder(world / "other")
    assert reachable(link, world / "art")
    (world / "other" / "deep").mkdir()
    deep = _link(world / "art" / "deep", "../other/deep/file")
    assert reachable(deep, world / "art") is None, "a record is of one folder"
    assert reachable(deep, world / "art", world / "other"), "the user names it now"


def test_a_download_cache_is_one_folder(world: Path) -> None:
    snapshot = world / "hub" / "snapshots" / "rev"
    for link in (
        _link(snapshot / "x", "../../blobs/hash"),
        _link(snapshot / "genai" / "y", "../../../blobs/hash"),
    ):
        assert reachable(link, snapshot) == (world / "hub" / "blobs" / "hash").resolve()
        assert reachable(link, link.parent)
    assert reachable(_link(snapshot / "out", "../../../other/file"), snapshot) is None
    assert reachable(_link(snapshot / "refs", "../../refs"), snapshot) is None


def test_blobs_that_are_a_link_are_no_cache(world: Path) -> None:
    fake = world / "fake" / "snapshots" / "rev"
    fake.mkdir(parents=True)
    _link(world / "fake" / "blobs", "../other")
    assert reachable(_link(fake / "x", "../../blobs/file"), fake) is None


def test_a_link_that_loops_leads_nowhere(world: Path) -> None:
    loop = _link(world / "art" / "loop", "loop")
    assert not is_regular(loop)
    reachable(loop, world / "art")


def test_devices_pipes_and_folders_are_no_files(world: Path) -> None:
    os.mkfifo(world / "pipe")
    for path in (world / "pipe", Path("/dev/zero"), world, world / "gone", Path("x" * 5000)):
        assert not is_regular(path)


def test_a_shard_that_leads_out_of_the_checkpoint_is_refused(checkpoint: Path) -> None:
    elsewhere = checkpoint.parent / "elsewhere"
    elsewhere.mkdir()
    (checkpoint / FIRST).rename(elsewhere / FIRST)
    _link(checkpoint / FIRST, elsewhere / FIRST)
    error = refusal(lambda: read_checkpoint(checkpoint), FIRST)
    assert "--weights-from" in error.next_step
    assert read_checkpoint(checkpoint, elsewhere).shards
    (checkpoint / FIRST).unlink()
    os.mkfifo(checkpoint / FIRST)
    with pytest.raises(MoecError, match="no such file"):
        read_checkpoint(checkpoint)
