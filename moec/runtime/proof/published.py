"""Compare the checkpoint that an artefact's folder is with the artefact.

Other engines read the folder by its config.json and generation_config.json, which no session of
moec reads. So an artefact may be right, and the same folder wrong as a checkpoint.
"""

from collections.abc import Iterator
from pathlib import Path

from moec.artefact.artefact import Artefact, file_of
from moec.exporters.publish import config_of, generation_of, told_of
from moec.runtime.proof.report import Check
from moec.spec.errors import MoecError
from moec.spec.fields import read_own_json, shown
from moec.spec.files import diff
from moec.spec.hf.architectures import ARCHITECTURES
from moec.spec.hf.forms import INDEX
from moec.weights.name_map import read_model

_FILES = ("config.json", "generation_config.json", INDEX)
#: ends of files that other engines load as weights
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
#: fields of a spec that say nothing of what an engine computes
_APART = ("provenance", "name", "notes")


def published_folder(artefact: Artefact, source: Path | None) -> Iterator[Check]:
    """Check that the folder of `artefact`, read as a checkpoint, is the artefact's model.

    With the folder `source` of the checkpoint that it was built from, fields count too that moec
    does not read.
    """
    if not artefact.manifest.weights.published:
        return
    try:
        odd = list(_differences(artefact, source))
    except MoecError as error:
        odd = [f"{error.where}: {error.found}, expected {error.expected}"]
    for what in odd:
        yield Check("as a checkpoint", "agreement", 0.0, 1.0, what[:300])
    if not odd:
        of = "the source's fields" if source else "the fields that moec reads"
        yield Check("as a checkpoint", "agreement", 1.0, 1.0, f"config.json and others, {of}")


def _differences(artefact: Artefact, source: Path | None) -> Iterator[str]:
    folder, manifest = artefact.path, artefact.manifest
    for name in _FILES:
        written = manifest.files.get(name)
        if written and file_of(folder / name) != written:
            yield f"{name}: other bytes than the build wrote"
    expected, config = told_of(manifest)
    found, _, entries = read_model(folder)
    shards = {(folder / name).resolve() for name in manifest.weights.shards}
    for name, entry in entries.items():
        if not {each.resolve() for each in entry.files} <= shards:
            yield f"{name}: in {entry.file.name}, which is no shard of the artefact"
            break
    for each in sorted(folder.iterdir()):
        if each.suffix in _WEIGHTS and each.resolve() not in shards:
            yield f"{each.name}: weights that are none of the artefact"
    for path, mine, right in diff(found, expected):
        if not path.startswith(_APART):
            yield f"{path}: {shown(mine)}, expected {shown(right)}"
    said = folder / "generation_config.json"
    values = read_own_json(said) if said.is_file() else {}
    for key, right in ARCHITECTURES[expected.architecture].generation(expected).items():
        if values.get(key) != right:
            yield f"generation_config.json: {key} is {shown(values.get(key))}, not {shown(right)}"
    if source is None:
        return
    if read_own_json(folder / "config.json") != config_of(source, expected, config):
        yield f"config.json: other fields than those in {source}"
    theirs = source / said.name
    own = read_own_json(theirs) if theirs.is_file() else {}
    wanted = generation_of(theirs, expected)
    if values != (own if wanted is None else wanted):
        yield f"generation_config.json: other fields than those in {source}"
