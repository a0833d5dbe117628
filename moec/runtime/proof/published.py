"""Compare the checkpoint that an artefact's folder is with the artefact.

Other engines read the folder by its config.json and generation_config.json, which no session of
moec reads, and look for more: adapters, templates, tokenizers, weights of other names, code. So an
artefact may be right, and the same folder wrong as a checkpoint. A folder is one if moec published
its weights there, or if it has a checkpoint's own weights and a config.json.
"""

import filecmp
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moec.artefact.artefact import Artefact, file_of
from moec.artefact.card import CARD
from moec.artefact.engine_job import ENGINES
from moec.artefact.manifest import NAME
from moec.artefact.opening.foreign import files_below, is_left
from moec.artefact.placement import COMPANIONS
from moec.exporters.onnx.genai import FOLDER
from moec.exporters.precision import in_precision
from moec.exporters.publish import config_of, generation_of, told_of
from moec.runtime.proof.report import Check
from moec.spec.bounded.own import find_own
from moec.spec.errors import MoecError
from moec.spec.fields import read_own_json, shown
from moec.spec.files import diff, is_left_out
from moec.spec.hf.architectures import ARCHITECTURES
from moec.spec.hf.config import read_config
from moec.spec.hf.forms import INDEX
from moec.spec.model import ModelSpec
from moec.weights.checkpoint import Checkpoint
from moec.weights.name_map import as_read, read_model
from moec.weights.shard import read_shard

_CONFIG, _GENERATION = "config.json", "generation_config.json"
#: the files besides shards that a build makes a checkpoint of
_FILES = (*COMPANIONS, INDEX)
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
#: files of text and images that other engines read. Somebody may have copied those that moec does
#: not read from the checkpoint.
_TEXT = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template|vocab|tekken"
    r"|(video_|audio_)?preprocessor_config|processor_config)\.json"
    r"|merges\.txt|vocab\.txt|tokenizer\.model|[^/]*\.tiktoken"
    r"|chat_template\.jinja|additional_chat_templates/[^/]*\.jinja"
)
#: files that no engine reads: pages, pictures, reports, licences, what tools of version control and
#: of downloads keep. A hidden file may not have the name of what engines read.
_UNREAD = re.compile(
    r".*\.(md|html|pdf|png|jpe?g|gif|svg|webp|csv|log)|report[^/]*\.json"
    r"|(LICEN[CS]E|NOTICE|COPYING)[^/.]*(\.txt)?"
    r"|\.[^/]*/.*|\.(?![^/]*\.(safetensors|bin|pth?|gguf|py|json|jinja|model)$)[^/]*",
    re.DOTALL,
)
#: weights, and what changes them, of the names that other engines look for
_WEIGHTS = re.compile(
    r"(model|consolidated|adapter|pytorch_model|diffusion)[^/]*\.(safetensors|bin|pth?|gguf)"
    r"|[^/]*\.(gguf|py)|[^/]*\.index\.json|adapter_config\.json|params\.json"
)
#: the placements that leave no weights of such names, unless they are published
_NO_CHECKPOINT = ("unbound", "pack")
#: how many such files a report names
_MOST = 8
#: fields of a spec that say nothing of what an engine computes
_APART = ("provenance", "name", "notes")


def published_folder(artefact: Artefact, source: Path | None) -> Iterator[Check]:
    """Check that the folder of `artefact`, read as a checkpoint, is the artefact's model.

    With the folder `source` of the checkpoint that it was built from, fields count too that moec
    does not read.
    """
    published = artefact.manifest.weights.published
    homes = [artefact.path] if published else _homes(artefact)
    odd = list[str]()
    try:
        if published:
            odd.extend(_differences(artefact, source))
        else:
            odd.extend(_other_weights(artefact))
            odd.extend(what for home in homes for what in _of_a_copy(artefact, home, source))
    except MoecError as error:
        odd.append(f"{error.where}: {error.found}, expected {error.expected}")
    for what in odd:
        yield Check("as a checkpoint", "agreement", 0.0, 1.0, what[:300])
    if homes and not odd:
        of = "the source's fields" if source else "the fields that moec reads"
        yield Check("as a checkpoint", "agreement", 1.0, 1.0, f"config.json and others, {of}")


def _homes(artefact: Artefact) -> list[Path]:
    """The folders of an artefact whose config.json other engines read with a checkpoint's weights.

    A checkpoint without its index counts too: some engines read all shards that they find.
    """
    weights = artefact.manifest.weights
    if weights.mode in _NO_CHECKPOINT:
        return []
    at = [artefact.path, *((artefact.weights_folder / name).parent for name in weights.shards)]
    mine = artefact.path.resolve()
    homes = [each for each in dict.fromkeys(at) if each.resolve().is_relative_to(mine)]
    return [each for each in homes if os.path.lexists(each / _CONFIG)]


def _of_a_copy(artefact: Artefact, home: Path, source: Path | None) -> Iterator[str]:
    """What the config.json in `home` says otherwise than the spec and the checkpoint `source`."""
    expected, names = artefact.manifest.spec, artefact.manifest.weights.shards
    shards = tuple(read_shard(artefact.shard(name), name) for name in names)
    tensors = {key: entry for shard in shards for key, entry in shard.tensors.items()}
    found, _, _ = as_read(
        read_config(home / _CONFIG, expected.text.mtp == "built"), Checkpoint(home, shards, tensors)
    )
    if found.fp8 and expected.scheme and not expected.scheme.cache:  # the build's own choice
        found = in_precision(found, "fp8", None, "wide")
    yield from _other_fields(found, expected)
    for name in (_CONFIG, _GENERATION):
        if source and _values(home / name) != _values(source / name):
            yield f"{name}: other fields than those in {source}"


def _other_weights(artefact: Artefact) -> Iterator[str]:
    """Files of an artefact that would make another checkpoint of it.

    Its config.json names the model, and other engines look beside that for weights of their names.
    """
    used = set[Path]()
    if artefact.manifest.weights.mode not in _NO_CHECKPOINT:
        used = {file.resolve() for entry in artefact.stored().values() for file in entry.files}
    for name in files_below(artefact.path):
        path = artefact.path / name
        if _WEIGHTS.fullmatch(name) and not is_left(name) and path.resolve() not in used:
            name = os.fsencode(name).decode(errors="replace")
            yield f"{name}: the artefact does not use it, and another engine may: remove it"


def _other_fields(found: ModelSpec, expected: ModelSpec) -> Iterator[str]:
    for path, mine, right in diff(found, expected):
        if not path.startswith(_APART) and not is_left_out(path, mine, right):
            yield f"{path}: {shown(mine)}, expected {shown(right)}"


def _values(path: Path) -> dict[str, Any]:
    return read_own_json(path) if path.is_file() else {}


def _differences(artefact: Artefact, source: Path | None) -> Iterator[str]:
    folder, manifest = artefact.path, artefact.manifest
    for name in _FILES:
        written = manifest.files.get(name)
        if written and file_of(folder / name) != written:
            yield f"{name}: other bytes than the build wrote"
    more = [os.fsencode(name).decode(errors="replace") for name in _more_files(artefact, source)]
    for name in more[:_MOST]:
        yield f"{name}: none of the artefact's files, and another engine may read it: remove it"
    if more[_MOST:]:
        yield f"{more[_MOST]}: {len(more) - _MOST} more such files"
    expected, config = told_of(manifest)
    found, _, entries = read_model(folder, mtp=expected.text.mtp == "built")
    shards = {(folder / name).resolve() for name in manifest.weights.shards}
    for name, entry in entries.items():
        if not {each.resolve() for each in entry.files} <= shards:
            yield f"{name}: in {entry.file.name}, which is no shard of the artefact"
            break
    read = {file.resolve() for entry in entries.values() for file in entry.files}
    for name in manifest.weights.shards:
        if (folder / name).resolve() not in read or not _SHARD.fullmatch(name):
            yield f"{name}: a shard in manifest.json, and none of the checkpoint"
    yield from _other_fields(found, expected)
    own = _values(folder / _CONFIG)
    if own.get("quantization_config") != config:  # engines read more of it than moec does
        yield "config.json: another quantization_config than the build wrote"
    values = _values(folder / _GENERATION)
    for key, right in ARCHITECTURES[expected.architecture].generation(expected).items():
        if values.get(key) != right:
            yield f"generation_config.json: {key} is {shown(values.get(key))}, not {shown(right)}"
    if source is None:
        return
    if own != config_of(source, expected, config):
        yield f"config.json: other fields than those in {source}"
    theirs = source / _GENERATION
    wanted = generation_of(theirs, expected)
    if values != (_values(theirs) if wanted is None else wanted):
        yield f"generation_config.json: other fields than those in {source}"


def _more_files(artefact: Artefact, source: Path | None) -> Iterator[str]:
    """The files of the folder that an engine may read, and that no build of moec puts there.

    The manifest alone does not decide: who adds a file can list it. Graphs, and the files for
    onnxruntime-genai, are compared with what the exporter writes: `graph_files`.
    """
    folder, manifest = artefact.path, artefact.manifest
    engines = {name for engine in manifest.engines.values() for name in engine.files}
    engines = {name for name in engines if name.startswith(f"{ENGINES}/")}
    ours = {NAME, CARD, *manifest.weights.shards, *artefact.graphs, *engines}
    ours |= manifest.files.keys() & {*_FILES}
    for name in files_below(folder):
        path = folder / name
        if name in ours or is_left(name) or _UNREAD.fullmatch(name):
            continue
        if name.startswith(f"{FOLDER}/"):
            continue
        if path.is_dir() and not path.is_symlink():
            continue  # it is empty
        theirs = find_own(source, name) if source and _TEXT.fullmatch(name) else None
        own = find_own(folder, name) if theirs else None
        if not (own and theirs and filecmp.cmp(own, theirs, shallow=False)):
            yield name
