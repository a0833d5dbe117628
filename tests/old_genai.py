"""Give an artefact of target ort the layout that moec wrote before: weights beside the models."""

import json
from pathlib import Path
from typing import Any

import onnx

from moec.exporters.onnx.genai import CONFIG, FOLDER, WEIGHTS
from tests.damage import json_file, listed_again


def as_before(art: Path) -> Path:
    """Move the weights out of genai's folder of `art`, and let every file say so."""

    def outside(manifest: dict[str, Any]) -> None:
        weights = manifest["weights"]
        weights["shards"] = {_outside(name): each for name, each in weights["shards"].items()}
        for ref in weights["tensors"].values():
            ref["file"] = _outside(ref["file"])

    for file in (art / FOLDER).glob("*.safetensors"):
        file.rename(art / file.name)
    json_file("manifest.json", outside)(art)
    graphs = [each.relative_to(art).as_posix() for each in art.rglob("*.onnx")]
    for name in graphs:
        model = onnx.load(art / name, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = _outside(entry.value)
        (art / name).write_bytes(model.SerializeToString())
    file = art / FOLDER / CONFIG
    config = json.loads(file.read_text())
    config["model"]["decoder"]["session_options"][WEIGHTS] = ".."
    file.write_text(json.dumps(config, indent=2))
    listed_again(art, *graphs, f"{FOLDER}/{CONFIG}")
    return art


def _outside(name: str) -> str:
    return name.removeprefix(f"{FOLDER}/")
