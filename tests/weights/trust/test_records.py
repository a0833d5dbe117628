"""What this user allows is kept outside artefacts, by processes that may write at once."""

import multiprocessing
import os
from pathlib import Path

import pytest

from moec.weights.trust import records
from moec.weights.trust.records import allow, allow_folder, folder_is_allowed, is_allowed


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(records, "_here", set())
    return tmp_path / "state"


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another process asked."""
    monkeypatch.setattr(records, "_here", set())


def test_a_folder_is_allowed_without_what_is_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("weights")
    assert allow_folder(tmp_path / "link")
    _forget(monkeypatch)
    real = tmp_path.resolve()
    assert folder_is_allowed(real / "weights")
    assert not folder_is_allowed(real / "weights" / "deep")
    assert not folder_is_allowed(real) and not folder_is_allowed(real / "weights2")


def test_the_root_of_all_files_is_never_recorded() -> None:
    assert not allow_folder(Path("/"))
    assert not folder_is_allowed(Path("/etc"))


def test_kinds_are_kept_apart() -> None:
    allow("native", "/x")
    assert is_allowed("native", "/x") and not is_allowed("folder", "/x")


@pytest.mark.parametrize("kind", ["read-only", "a file", "no home"])
def test_a_state_that_cannot_be_written_is_no_error(
    state: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "read-only":
        monkeypatch.setenv("XDG_STATE_HOME", "/proc/moec-state")
    elif kind == "a file":
        state.write_text("mine")
    else:
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        assert records.state_folder() is None
    assert not allow("native", "abc")
    assert is_allowed("native", "abc")  # this process remembers
    assert not is_allowed("native", "abc", on_disk=True)
    assert kind != "a file" or state.read_text() == "mine"


def test_a_relative_state_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert records.state_folder() == Path("/home/somebody/.local/state/moec")


def test_records_are_bounded_and_live_folders_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MOST", 8)
    assert allow("folder", str(tmp_path))
    for i in range(30):
        assert allow("folder", f"/gone/{i}")
    _forget(monkeypatch)
    assert is_allowed("folder", str(tmp_path)) and is_allowed("folder", "/gone/29")
    assert len([*(tmp_path / "state" / "moec" / "allowed" / "folder").iterdir()]) <= 8


def _write(number: int) -> None:
    for i in range(40):
        assert allow("native", f"{number % 2} {i}")


def test_processes_that_write_at_once_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_write, args=(i,)) for i in range(4)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    assert [each.exitcode for each in processes] == [0] * 4
    assert all(is_allowed("native", f"{n} {i}") for n in range(2) for i in range(40))
