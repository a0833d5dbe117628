"""What a manifest says of its graphs: inputs, outputs and opset."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec.artefact.artefact import open_artefact
from moec.exporters.as_written import other_files
from moec.spec.errors import MoecError
from moec.weights.random import write_random_checkpoint
from tests.damage import SPEC
from tests.refusals import refusal

Change = Callable[[dict[str, Any]], object]
#: what a manifest says wrongly -> (how, what is named)
WRONG: dict[str, tuple[Change, str]] = {
    "type of an output": (lambda m: m["outputs"][0].update(dtype="float16x"), "outputs.logits"),
    "type of an input": (lambda m: m["inputs"][0].update(dtype="int32"), "inputs.input_ids"),
    "shape": (lambda m: m["inputs"][0].update(shape=["batch", 7]), "inputs.input_ids"),
    "order": (lambda m: m["inputs"].reverse(), "inputs"),
    "twice": (lambda m: m["inputs"].append(m["inputs"][0]), "inputs"),
    "type of the tower": (
        lambda m: m["vision"]["outputs"][0].update(dtype="int8"),
        "outputs.image_features",
    ),
    "opset": (lambda m: m.update(opset=11), "opset"),
}
#: what no session can open
NAMES: dict[str, Change] = {
    "pixel_values": lambda m: m["vision"]["inputs"][0].update(name="pixels"),
    "image_features": lambda m: m["vision"]["outputs"][0].update(name="features"),
    "lengths": lambda m: [
        each.update(name="n") for each in m["inputs"] if each["name"] == "lengths"
    ],
}


@pytest.fixture(scope="module", params=["onnx", "torch"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "art"
    precision = "fp32" if request.param == "onnx" else "bf16"
    write_random_checkpoint(SPEC, out.parent / "wide", seed=3)
    return moec.export(out.parent / "wide", request.param, precision, out).path


@pytest.mark.parametrize(
    ("precision", "said"), [("int4", "fp32"), ("int8", "int4"), ("fp8", "int8")]
)
def test_a_manifest_does_not_say_another_precision_than_its_weights_have(
    precision: str, said: str, tiny: Path, tmp_path: Path
) -> None:
    """A report would say PASSED of a precision that the numbers do not have."""
    sound = moec.export(tiny, "ort", precision, tmp_path / "sound").path
    art = changed(sound, tmp_path, lambda m: m.update(precision=said))
    refusal(lambda: open_artefact(art), said)


def changed(sound: Path, folder: Path, change: Change) -> Path:
    art = shutil.copytree(sound, folder / "art")
    manifest = json.loads((art / "manifest.json").read_text())
    change(manifest)
    del manifest["digest"]
    (art / "manifest.json").write_text(json.dumps(manifest))
    return art


def test_a_right_manifest_is_the_exporters(sound: Path) -> None:
    assert other_files(open_artefact(sound)) == {}


@pytest.mark.parametrize("kind", WRONG)
def test_a_proof_compares_it_with_the_exporters(kind: str, sound: Path, tmp_path: Path) -> None:
    change, named = WRONG[kind]
    found = other_files(open_artefact(changed(sound, tmp_path, change)))
    assert [*found] == ["manifest.json"] and named in found["manifest.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_name_is_refused_when_the_graph_opens(
    name: str, sound: Path, tmp_path: Path
) -> None:
    art = changed(sound, tmp_path, NAMES[name])
    assert name in other_files(open_artefact(art))["manifest.json"]
    refusal(lambda: moec.validate(art), "put", code=1)  # an input or output
    vision = SPEC.vision
    assert vision is not None
    shape = (1, vision.channels, vision.image, vision.image)
    with pytest.raises(MoecError):
        moec.open_session(art).image_features(np.zeros(shape, dtype=np.float32))
