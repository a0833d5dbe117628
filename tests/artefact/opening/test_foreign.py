"""A build replaces its own files alone, and writes nowhere else than it says."""

import json
import os
import shutil
from pathlib import Path

import pytest

import moec
from moec.artefact.folder import default_out, refuse_foreign
from moec.artefact.opening.foreign import foreign_file
from moec.spec.errors import MoecError
from tests.damage import FIRST
from tests.refusals import refusal, refused_and_nothing_left

MINE = ["notes.txt", "deep/er/notes.txt", ".git/config", "model.onnx.bak", "weights.safetensors",
        "engine/notes.txt", "config.json.orig", ".manifest.json.x"]  # fmt: skip


@pytest.mark.parametrize("name", MINE)
def test_a_file_of_the_user_in_an_artefact_is_found(artefact: Path, name: str) -> None:
    (artefact / name).parent.mkdir(parents=True, exist_ok=True)
    (artefact / name).write_text("mine")
    refusal(lambda: refuse_foreign(artefact), name)


def test_a_file_of_the_user_in_an_artefact_is_kept(
    artefact: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (artefact / "notes.txt").write_text("mine")
    for call in (
        lambda: moec.export(checkpoint, out=artefact),
        lambda: moec.bind(artefact, checkpoint),
    ):
        refused_and_nothing_left(tmp_path, call, "notes.txt")


def test_a_link_and_an_empty_folder_in_an_artefact_are_kept(artefact: Path) -> None:
    (artefact / "sub").mkdir()
    assert foreign_file(artefact) == "sub"
    (artefact / "sub").rmdir()
    (artefact / "home").symlink_to("/")
    assert foreign_file(artefact) == "home"


@pytest.mark.parametrize(
    "manifest",
    [
        {"format": "moec/1"},
        {"format": "moec/1", "files": ["notes.txt"], "weights": 1, "engines": [1]},
        {"format": "moec/1", "weights": {"folder": "/x", "shards": {"notes.txt": 1}}},
        {"format": "moec/1", "engines": {"model": {"file": 1, "files": "notes.txt"}}},
    ],
)
def test_a_manifest_with_our_format_alone_frees_nothing(tmp_path: Path, manifest: object) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "home" / "notes.txt").write_text("mine")
    refused_and_nothing_left(tmp_path, lambda: refuse_foreign(tmp_path / "home"), "notes.txt")


def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "manifest.json")
    refusal(lambda: refuse_foreign(tmp_path / "out"), "manifest.json")


def test_what_a_killed_process_left_is_no_users_file(artefact: Path, checkpoint: Path) -> None:
    (artefact / ".manifest.json.4194303").write_text("{")
    (artefact / ".moec-draft.0123456789abcdef").write_text("{")
    for folder in (".engine.moec-partial-4194303", "engine"):
        (artefact / folder).mkdir()
        (artefact / folder / "model.engine").write_text("half")
    assert foreign_file(artefact) is None
    moec.export(checkpoint, out=artefact)
    assert not (artefact / "engine").exists()


@pytest.mark.parametrize("target, weights", [("onnx", "in-place"), ("ort", "copy")])
def test_every_artefact_is_its_own(
    checkpoint: Path, tmp_path: Path, target: str, weights: str
) -> None:
    art = moec.export(checkpoint, target=target, precision="fp32", weights=weights,
                      out=tmp_path / "art").path  # fmt: skip
    assert foreign_file(art) is None


@pytest.mark.parametrize(
    "name",
    ["../../evil", "/etc/evil", "a/b", "..", ".hidden", "-rf", "a\\b", "a\nb", "\x1b[2J", "a:b",
     "x" * 300],
    ids=ascii,
)  # fmt: skip
def test_a_spec_whose_name_is_no_folder_needs_an_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = moec.load_spec("tiny-scout").model_copy(update={"name": name})
    error = refusal(lambda: moec.export(spec), "spec.name")
    assert "--out" in error.next_step and not [*tmp_path.iterdir()]


def test_the_default_out_is_one_folder() -> None:
    assert default_out("Llama-4-Scout.v1", "onnx", "fp32").parts == (
        "build",
        "Llama-4-Scout.v1-onnx-fp32",
    )


@pytest.mark.parametrize(
    "weights, name", [("copy", "tokenizer_config.json"), ("pack", "chat_template.jinja")]
)
def test_a_companion_that_leads_out_is_not_copied(
    checkpoint: Path, tmp_path: Path, weights: str, name: str
) -> None:
    (tmp_path / "secret").write_text('{"secret": 1}')
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to("../secret")
    target = "ort" if weights == "pack" else "onnx"
    out = tmp_path / "art"
    refusal(
        lambda: moec.export(checkpoint, target=target, precision="fp32", weights=weights, out=out),
        name,
    )
    assert not out.exists()


def test_genai_gets_no_companion_that_leads_out(checkpoint: Path, tmp_path: Path) -> None:
    """Weights stay in place, so that only the folder of genai gets a tokenizer."""
    (tmp_path / "secret").write_text("{}")
    (checkpoint / "tokenizer.json").unlink(missing_ok=True)
    (checkpoint / "tokenizer.json").symlink_to("../secret")
    out = tmp_path / "art"
    refusal(
        lambda: moec.export(
            checkpoint, target="ort", precision="fp32", weights="in-place", out=out
        ),
        "tokenizer.json",
    )
    assert not out.exists()


def test_only_a_shard_may_lie_in_a_named_folder(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer_config.json").write_text('{"a": 1}')
    shutil.move(checkpoint / FIRST, other / FIRST)
    for name in ("tokenizer_config.json", FIRST):
        (checkpoint / name).unlink(missing_ok=True)
        (checkpoint / name).symlink_to(other / name)
    with pytest.raises(MoecError, match=r"tokenizer_config\.json"):
        moec.export(checkpoint, out=tmp_path / "art", weights="copy", weights_from=other)
    (checkpoint / "tokenizer_config.json").unlink()
    art = moec.export(checkpoint, out=tmp_path / "art", weights="copy", weights_from=other)
    assert moec.open_session(art.path).logits([[5]]).shape[:2] == (1, 1)
