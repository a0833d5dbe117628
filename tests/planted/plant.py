"""Plant a fault in a copy of an artefact, and make its manifest agree with the files again."""

import hashlib
import json
import shutil
from pathlib import Path

import onnx

from tests.planted.fault import Fault

MANIFEST = "manifest.json"


def planted(artefact: Path, fault: Fault, folder: Path) -> Path:
    """Copy the artefact to `folder`, and plant `fault` in the copy."""
    shutil.copytree(artefact, folder)
    if fault.file:
        path = folder / fault.file
        model = onnx.load(path, load_external_data=False)
        fault.plant(model, fault.layer)
        onnx.save(model, path)
    else:
        fault.plant(folder, fault.layer)
    agree(folder)
    return folder


def agree(folder: Path) -> None:
    """Let the manifest say the sizes and hashes that the files have now.

    A stranger who makes a mistake runs a tool that writes them; so no hash may give a fault away.
    """
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, file in manifest["files"].items():
        data = (folder / name).read_bytes()
        file |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name, shard in manifest["weights"]["shards"].items():  # their headers are as they were
        if "sha256" in shard:
            shard["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    manifest["weights"].pop("hashes", None)
    manifest.pop("digest", None)
    content = json.dumps(manifest, sort_keys=True).encode()
    manifest["digest"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
