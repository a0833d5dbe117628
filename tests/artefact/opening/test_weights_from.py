"""Weights outside an artefact open only where this user built or bound, or names a folder now."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec.artefact.artefact import open_artefact, verify_files
from moec.artefact.parity import identity
from moec.runtime.inputs.text import open_text
from moec.spec.errors import MoecError
from moec.weights.trust import records
from tests.conftest import run_command
from tests.damage import FIRST, SECOND, tensor_refs
from tests.refusals import refusal

IDS = [[5, 6, 7]]


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """Makes this process that of another user, who has built nothing."""

    def become() -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
        monkeypatch.setattr(records, "_here", set())

    return become


@pytest.fixture
def in_place(checkpoint: Path, tmp_path: Path) -> Path:
    return moec.export(checkpoint, out=tmp_path / "in-place").path


def _logits(path: Path, **named: Any) -> Any:
    return np.asarray(moec.open_session(path, **named).logits(IDS))


@pytest.mark.parametrize("engine", ["onnxruntime", "eager"])
def test_another_user_must_name_the_folder(
    in_place: Path, checkpoint: Path, stranger: Callable[[], None], engine: str
) -> None:
    expected = _logits(in_place, engine=engine)
    stranger()
    error = refusal(lambda: moec.open_session(in_place, engine=engine), "/checkpoint")
    assert f"--weights-from {checkpoint}" in error.next_step
    found = _logits(in_place, engine=engine, weights_from=checkpoint)
    assert np.array_equal(found, expected)


def test_a_record_is_of_a_folder_and_not_of_an_artefact(
    in_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_here", set())  # as in another process
    in_place.rename(tmp_path / "moved")
    assert _logits(tmp_path / "moved").shape[:2] == (1, 3)


def test_bind_records_the_folder(
    checkpoint: Path, tmp_path: Path, stranger: Callable[[], None]
) -> None:
    art = moec.export(moec.load_spec(checkpoint), out=tmp_path / "art").path
    stranger()
    moec.bind(art, checkpoint)
    assert _logits(art).shape[:2] == (1, 3)


def test_a_checkpoint_that_moved_is_named(in_place: Path, checkpoint: Path, tmp_path: Path) -> None:
    expected = _logits(in_place)
    checkpoint.rename(tmp_path / "elsewhere")
    error = refusal(lambda: moec.open_session(in_place), "/checkpoint")
    assert "--weights-from DIR" in error.next_step
    assert np.array_equal(_logits(in_place, weights_from=tmp_path / "elsewhere"), expected)
    shutil.copyfile(tmp_path / "elsewhere" / FIRST, tmp_path / "elsewhere" / SECOND)
    refusal(lambda: moec.open_session(in_place, weights_from=tmp_path / "elsewhere"), SECOND)
    refusal(lambda: moec.open_session(in_place, weights_from=tmp_path / "gone"), "--weights-from")


def test_the_root_is_no_folder_of_weights(artefact: Path, tmp_path: Path) -> None:
    """The manifest names "/" and files of this user below it."""
    secret = tmp_path / "secret"
    secret.mkdir()
    path = artefact / "manifest.json"
    values = json.loads(path.read_text())
    weights = values["weights"]
    for name in (FIRST, SECOND):
        (artefact / name).rename(secret / name)
        place = str(secret.resolve() / name).lstrip("/")
        weights["shards"][place] = weights["shards"].pop(name)
        for ref in weights["tensors"].values():
            ref["file"] = place if ref["file"] == name else ref["file"]
    weights |= {"mode": "in-place", "folder": "/"}
    path.write_text(json.dumps(values))
    for engine in ("onnxruntime", "eager"):
        refusal(lambda engine=engine: moec.open_session(artefact, engine=engine), "in /")


@pytest.mark.parametrize("engine", ["onnxruntime", "eager"])
@pytest.mark.parametrize("kind", ["file", "link", "fifo", "device", "folder"])
def test_a_shard_is_a_regular_file_inside(
    artefact: Path, tmp_path: Path, kind: str, engine: str
) -> None:
    shard, other = artefact / FIRST, tmp_path / "other.safetensors"
    shard.rename(other)
    if kind == "file":
        other.rename(shard)
        assert moec.open_session(artefact, engine=engine)
        return
    {
        "link": lambda: shard.symlink_to(other),
        "fifo": lambda: os.mkfifo(shard),
        "device": lambda: shard.symlink_to("/dev/zero"),
        "folder": lambda: shard.mkdir(),
    }[kind]()
    refusal(lambda: moec.open_session(artefact, engine=engine), FIRST)
    if kind == "link":
        assert moec.open_session(artefact, engine=engine, weights_from=tmp_path)


def _swap(refs: dict[str, Any]) -> None:
    """Two weights of one shape change places, each still inside its shard."""
    a, b = (refs[f"layers.0.attn.{x}.weight"] for x in "kv")
    kept = dict(a)
    a.update(b)
    b.update(kept)


def _shift(refs: dict[str, Any]) -> None:
    refs["embed.weight"]["offset"] += 2


@pytest.mark.parametrize("change", [_swap, _shift])
@pytest.mark.parametrize("engine", ["onnxruntime", "eager"])
def test_a_tensor_is_at_the_place_in_its_shards_header(
    artefact: Path, change: Callable[[dict[str, Any]], None], engine: str
) -> None:
    tensor_refs(change)(artefact)
    refusal(lambda: moec.open_session(artefact, engine=engine), "weights.tensors")


@pytest.mark.parametrize(
    "choice",
    [
        {"weights": "copy"},
        {"target": "ort", "precision": "fp32", "weights": "pack"},
        pytest.param({"target": "torch", "precision": "fp8"}, marks=pytest.mark.slow),
    ],
    ids=["copy", "pack", "torch"],
)
def test_an_artefact_in_a_download_cache_opens(
    sound: Path, tmp_path: Path, stranger: Callable[[], None], choice: dict[str, Any]
) -> None:
    art = moec.export(sound, out=tmp_path / "art", **choice).path
    expected = _logits(art)
    snapshot = to_cache(art, tmp_path / "hub")
    shutil.rmtree(art)
    stranger()
    assert np.array_equal(_logits(snapshot), expected)
    assert np.array_equal(_logits(snapshot, engine="eager"), _logits(snapshot, engine="eager"))
    code, said, wrong = run_command("inspect", snapshot, "--verify")
    assert code == 0 and "verified" in said, wrong


def to_cache(folder: Path, hub: Path) -> Path:
    """Move the files of `folder` to where a download tool's cache has them; the snapshot."""
    snapshot, blobs = hub / "snapshots" / "abc", hub / "blobs"
    blobs.mkdir(parents=True)
    for file in [each for each in folder.rglob("*") if each.is_file()]:
        data = file.read_bytes()
        blob = blobs / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_checkpoint_in_a_download_cache_can_move(
    sound: Path, tmp_path: Path, stranger: Callable[[], None]
) -> None:
    snapshot = to_cache(sound, tmp_path / "hub")
    art = moec.export(snapshot, out=tmp_path / "art", hash_weights=True).path
    expected = _logits(art)
    (tmp_path / "hub").rename(tmp_path / "new")
    stranger()
    named = tmp_path / "new" / "snapshots" / "abc"
    assert np.array_equal(_logits(art, weights_from=named), expected)
    hashed = verify_files(open_artefact(art, named)).hashed
    assert {*open_artefact(art).manifest.weights.shards} <= {*hashed}


def test_a_proof_on_weights_that_the_user_names_is_stored(
    in_place: Path, checkpoint: Path, tmp_path: Path, stranger: Callable[[], None]
) -> None:
    moved = checkpoint.rename(tmp_path / "moved")
    stranger()
    code, _, said = run_command("validate", in_place, "--tokens", 6, "--weights-from", moved)
    assert code == 0 and "not stored" not in said, said
    assert open_artefact(in_place).manifest.parity


def test_what_identifies_an_artefact_is_nothing_of_a_folder_that_is_not_allowed(
    in_place: Path, stranger: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = identity(open_artefact(in_place))
    stranger()
    monkeypatch.setattr("moec.artefact.parity.read_shard", None)
    assert identity(open_artefact(in_place)) != here


def test_the_checkpoint_of_a_stranger_is_not_looked_at(
    tiny: Path, tmp_path: Path, stranger: Callable[[], None]
) -> None:
    """The manifest names a folder of this user, whose tokenizer would be read."""
    art = moec.export(tiny, out=tmp_path / "art").path
    assert open_artefact(art).companion("tokenizer.json") == tiny / "tokenizer.json"
    stranger()
    artefact = open_artefact(art)
    assert artefact.checkpoint is None and artefact.companion("tokenizer.json") is None
    refusal(lambda: open_text(artefact), "--weights-from")
    assert open_text(open_artefact(art, tiny)).encode("def")


def test_a_file_of_the_artefact_that_leads_out_is_refused(artefact: Path, tmp_path: Path) -> None:
    (artefact / "model.onnx").rename(tmp_path / "model.onnx")
    (artefact / "model.onnx").symlink_to("../model.onnx")
    refusal(lambda: open_artefact(artefact), "model.onnx")


def test_the_command_line_takes_the_folder(
    in_place: Path, checkpoint: Path, stranger: Callable[[], None]
) -> None:
    stranger()
    code, _, wrong = run_command("generate", in_place, "--ids", "5,6", "--max-new-tokens", 1)
    assert code == 2 and f"--weights-from {checkpoint}" in wrong
    for command in (
        ("generate", in_place, "--ids", "5,6", "--max-new-tokens", 1),
        ("inspect", in_place, "--verify"),
    ):
        code, _, wrong = run_command(*command, "--weights-from", checkpoint)
        assert code == 0, wrong


def test_a_build_says_what_it_could_not_record(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/moec-state")
    out = tmp_path / "art"
    code, said, wrong = run_command(
        "build", "--checkpoint", checkpoint, "--out", out, "--no-validate"
    )
    assert code == 0, wrong
    assert f"add --weights-from {checkpoint}" in said.replace("\n", " ")
    assert _logits(out).shape[:2] == (1, 3)  # this process still knows
    monkeypatch.setattr(records, "_here", set())
    with pytest.raises(MoecError):
        moec.open_session(out)
