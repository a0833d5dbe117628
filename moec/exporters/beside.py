"""Compare the files beside an artefact's graphs with those that the exporter writes now.

onnxruntime-genai takes session options, end tokens, sampling and a tokenizer from its folder, and
looks for more files there. So the folder must hold what moec writes, and nothing else.
"""

import filecmp
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from moec.artefact.artefact import Artefact
from moec.exporters.onnx.genai import CONFIG, FOLDER, WEIGHTS, spelled
from moec.spec.bounded.own import own_file
from moec.spec.fields import shown

_OPTION = ("model", "decoder", "session_options", WEIGHTS)
#: bytes of the longest configuration that is looked at; moec writes a few thousand
_LONGEST = 1 << 20


def beside(artefact: Artefact, written: Path) -> dict[str, str]:
    """The files of genai's folder that differ from those in `written`, and how each does first.

    `written` is the artefact's folder as the exporter writes it now. Graphs are not compared here,
    nor weights, which a proof runs.
    """
    graphs, shards = set(artefact.graphs), artefact.manifest.weights.shards
    right = {name for name in _below(written) if name not in graphs}
    weights = {name for name in shards if name.endswith(".safetensors")}
    here = set(_below(artefact.path))
    found = {name: _difference(artefact, name, written / name) for name in sorted(right & here)}
    found |= dict.fromkeys(sorted(right - here), "missing")
    more = sorted(here - right - graphs - weights)
    found |= dict.fromkeys(more, "moec writes no such file")
    return {name: what for name, what in found.items() if what}


def stale(artefact: Artefact) -> str | None:
    """Where genai looks for weights in place, if there are none any more; None if there are.

    genai's configuration holds a relative path, which is wrong if the artefact or the checkpoint
    has moved since the build. Then genai opens nothing.
    """
    file = artefact.path / FOLDER / CONFIG
    if artefact.manifest.weights.folder is None or not file.is_file():
        return None
    folder = _option(_parsed(file))
    return None if folder is None or _leads_to(artefact, folder) else shown(folder)


def _below(root: Path) -> Iterator[str]:
    """The name of every file, link and empty folder in genai's folder; links are not followed."""
    for at, folders, files in os.walk(root / FOLDER):
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        place = Path(at).relative_to(root)
        yield from ((place / name).as_posix() for name in (*files, *links))
        if not files and not folders:
            yield place.as_posix()


def _difference(artefact: Artefact, name: str, right: Path) -> str | None:
    if name not in artefact.manifest.files:
        return "the manifest lists no such file"
    stored = own_file(artefact.path / name, artefact.path)
    if name == f"{FOLDER}/{CONFIG}":
        return _of_config(artefact, stored, right)
    same = filecmp.cmp(stored, right, shallow=False)
    return None if same else "other bytes than the file that sessions of the artefact read"


def _of_config(artefact: Artefact, stored: Path, right: Path) -> str | None:
    """The first field that differs. What counts are bytes, as programs read JSON differently."""
    found, expected = _parsed(stored), _parsed(right)
    if found is None:
        return "no JSON of reasonable size"
    folder = _option(found)
    if folder is not None and _may_lead(artefact, folder):
        expected["model"]["decoder"]["session_options"][WEIGHTS] = folder
    # older versions escaped what is not ASCII
    if stored.read_bytes() in (spelled(expected), json.dumps(expected, indent=2).encode()):
        return None
    theirs, mine = dict(_fields(found)), dict(_fields(expected))
    for where in (*mine, *theirs):
        said, wanted = (shown(each[where]) if where in each else "none" for each in (theirs, mine))
        if said != wanted:
            return f"{where[:200]}: {said}, expected {wanted}"
    return "the same fields, spelled otherwise than moec writes them"


def _parsed(file: Path) -> Any:
    """The JSON value in `file`; None if there is none. Control characters may be as they are."""
    if file.stat().st_size > _LONGEST:
        return None
    try:
        return json.loads(file.read_bytes(), strict=False)
    except (ValueError, RecursionError):
        return None


def _fields(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of nested objects, by its dotted name; a list is one value."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _fields(inner, f"{at}.{name}" if at else name)
    else:
        yield at, value


def _option(config: Any) -> str | None:
    """The folder that a configuration names for the weights."""
    for name in _OPTION:
        config = config.get(name) if isinstance(config, dict) else None
    return config if isinstance(config, str) else None


def _may_lead(artefact: Artefact, folder: str) -> bool:
    """Whether a build may have written `folder`, and no other weights than the proven are there.

    A build writes the way from the artefact to the weights in place. Either may move afterwards, so
    the way may lead nowhere now; but it must be one to the weights from some other place.
    """
    if artefact.manifest.weights.folder is None:
        return False
    if _leads_to(artefact, folder):
        return True
    parts, end = PurePosixPath(folder).parts, PurePosixPath(artefact.manifest.weights.folder).parts
    down = tuple(part for part in parts if part != "..")
    ours = (
        parts == (*[".."] * (len(parts) - len(down)), *down) and end[len(end) - len(down) :] == down
    )
    return ours and not any(os.path.lexists(each) for each in _places(artefact, folder).values())


def _leads_to(artefact: Artefact, folder: str) -> bool:
    """Whether the shards that genai finds in `folder` are those of the artefact."""
    return all(
        os.path.exists(place) and os.path.samefile(place, artefact.shard(name))
        for name, place in _places(artefact, folder).items()
    )


def _places(artefact: Artefact, folder: str) -> dict[str, str]:
    """Where genai looks for each shard: it appends `folder` to its own folder."""
    start = artefact.path / FOLDER
    return {name: f"{start}/{folder}/{name}" for name in artefact.manifest.weights.shards}
