"""An artefact that is damaged or lacks its weights does not open; one clear message says why."""

import shutil
from pathlib import Path

import pytest

import moec
from tests.damage import (
    FIRST,
    NESTED,
    SECOND,
    SPEC,
    Damage,
    drop,
    folder_instead,
    grow,
    halve,
    manifest,
    other_header,
    reference,
    remove,
    tensor_refs,
    text,
)
from tests.refusals import refusal

#: what is wrong -> (damage, what the message must name)
ARTEFACTS: dict[str, tuple[Damage, str]] = {
    "an empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "/art"),
    "no folder": (shutil.rmtree, "/art"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("mine")), "/art"),
    "no manifest": (
        lambda folder: [(folder / name).unlink() for name in ("manifest.json", "config.json")],
        "manifest.json",
    ),
    "no model": (remove("model.onnx"), "model.onnx"),
    "a model cut short": (halve("model.onnx"), "model.onnx"),
    "no vision tower": (remove("vision.onnx"), "vision.onnx"),
    "a vision tower cut short": (halve("vision.onnx"), "vision.onnx"),
    "a manifest without the vision tower": (drop("manifest.json", "vision"), "vision tower"),
    "an empty model": (text("model.onnx", b""), "model.onnx"),
    "a model that grew": (grow("model.onnx"), "model.onnx"),
    "a shard that is gone": (remove(SECOND), SECOND),
    "a shard cut short": (halve(SECOND), SECOND),
    "an empty shard": (text(SECOND, b""), SECOND),
    "a shard that grew": (grow(SECOND), SECOND),
    "a shard with another header": (other_header, FIRST),
    "a shard that is a folder": (folder_instead(SECOND), SECOND),
    "a manifest cut short": (halve("manifest.json"), "manifest.json"),
    "an empty manifest": (text("manifest.json", ""), "manifest.json"),
    "a manifest that is a list": (text("manifest.json", "[]"), "manifest.json"),
    "a manifest that is no text": (text("manifest.json", b"\xff\xfe"), "manifest.json"),
    "a manifest nested without end": (text("manifest.json", NESTED), "manifest.json"),
    "a manifest of something else": (text("manifest.json", '{"name": "x"}'), "manifest.json"),
    "a manifest of another version": (manifest("format", "moec/2"), "format"),
    "a manifest without a spec": (drop("manifest.json", "spec"), "spec"),
    "a manifest with an unknown field": (manifest("sparkle", 1), "sparkle"),
    "a manifest with an unknown weight mode": (manifest("weights.mode", "cloud"), "mode"),
    "a manifest with text for a number": (manifest("opset", "many"), "opset"),
    "a parameter that the model lacks": (
        tensor_refs(lambda refs: refs.update(extra=refs["embed.weight"])),
        "extra",
    ),
    "a parameter that is not said": (
        tensor_refs(lambda refs: refs.pop("embed.weight")),
        "embed.weight",
    ),
    "a parameter in an unknown shard": (reference(lambda ref: ref.update(file="x")), "embed"),
    "a parameter in another file": (
        reference(lambda ref: ref.update(file="../checkpoint/config.json")),
        "embed.weight",
    ),
    "a parameter before the file": (reference(lambda ref: ref.update(offset=-8)), "embed.weight"),
    "a parameter beyond the file": (reference(lambda ref: ref.update(offset=10**9)), "embed"),
    "a parameter cut short": (reference(lambda ref: ref.update(length=2)), "embed.weight"),
    "a spec of another width": (manifest("spec.text.dim", 64), "/art"),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["onnxruntime", "eager"])
@pytest.mark.parametrize("case", ARTEFACTS)
def test_a_damaged_artefact_does_not_open(artefact: Path, case: str, engine: str) -> None:
    damage, names = ARTEFACTS[case]
    damage(artefact)
    refusal(lambda: moec.open_session(artefact, engine=engine), names)


@pytest.mark.parametrize("engine", ["onnxruntime", "eager"])
def test_an_artefact_without_weights_does_not_open(tmp_path: Path, engine: str) -> None:
    art = moec.export(SPEC, out=tmp_path / "art").path
    error = refusal(lambda: moec.open_session(art, engine=engine), "/art")
    assert "bind" in error.next_step


def test_an_artefact_whose_checkpoint_moved_does_not_open(checkpoint: Path, tmp_path: Path) -> None:
    art = moec.export(checkpoint, out=tmp_path / "art").path
    checkpoint.rename(tmp_path / "elsewhere")
    refusal(lambda: moec.open_session(art), "/checkpoint")


def test_a_model_with_other_bytes_of_the_same_size_does_not_load(artefact: Path) -> None:
    model = artefact / "model.onnx"
    model.write_bytes(b"\xff" * model.stat().st_size)
    refusal(lambda: moec.open_session(artefact), "model.onnx", code=1)
