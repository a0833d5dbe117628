"""Ways to damage a copy of the sound checkpoint or artefact, and to fail a build on its way."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moec.artefact.artefact import file_of
from moec.artefact.manifest import digest_of
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced

#: the sound checkpoint: its model, its files, and three of its tensors, all in the first shard
SPEC = reduced(PRESETS["tiny-scout"])
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
#: and a checkpoint of one file
ONLY = "model.safetensors"
EMBED = "language_model.model.embed_tokens.weight"
NORMS = tuple(f"language_model.model.layers.{i}.input_layernorm.weight" for i in (0, 1))

NESTED = "[" * 200_000
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

#: damages a copy of a sound checkpoint or artefact
Damage = Callable[[Path], object]


# ---------------------------------------------------------------- any file


def json_file(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the JSON object in file `name`."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return damage


def put(name: str, dotted: str, value: object) -> Damage:
    """Set field `dotted` of the JSON file `name`."""

    def change(values: dict[str, Any]) -> None:
        *outer, last = dotted.split(".")
        for key in outer:
            values = values[key]
        values[last] = value

    return json_file(name, change)


def drop(name: str, dotted: str) -> Damage:
    """Remove field `dotted` of the JSON file `name`."""

    def change(values: dict[str, Any]) -> None:
        *outer, last = dotted.split(".")
        for key in outer:
            values = values[key]
        del values[last]

    return json_file(name, change)


def text(name: str, content: str | bytes) -> Damage:
    """Write `content` to file `name`."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def folder_instead(name: str) -> Damage:
    """A folder where file `name` should be."""
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def grow(name: str) -> Damage:
    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b"x")

    return damage


def halve(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


# ---------------------------------------------------------------- a checkpoint


def cut(where: Callable[[int, int], int]) -> Damage:
    """Cut the first shard after `where(length of the header, size of the file)` bytes."""

    def damage(folder: Path) -> None:
        raw = (folder / FIRST).read_bytes()
        (folder / FIRST).write_bytes(raw[: where(int.from_bytes(raw[:8], "little"), len(raw))])

    return damage


def raw_header(header: bytes, length: int | None = None) -> Damage:
    """Replace the first shard's header, or only the length that it states."""

    def damage(folder: Path) -> None:
        raw = (folder / FIRST).read_bytes()
        data = raw[8 + int.from_bytes(raw[:8], "little") :]
        stated = len(header) if length is None else length
        (folder / FIRST).write_bytes(stated.to_bytes(8, "little") + header + data)

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the first shard's header; the data stay."""

    def damage(folder: Path) -> None:
        raw = (folder / FIRST).read_bytes()
        rows = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        change(rows)
        raw_header(json.dumps(rows).encode())(folder)

    return damage


def row(field: str, value: object) -> Damage:
    """Set one field of the embedding's row in the first shard's header."""
    return header(lambda rows: rows[EMBED].update({field: value}))


def offsets(change: Callable[[int, int, int], list[Any]]) -> Damage:
    """Change the embedding's start and end, given these and the size of all data."""

    def changed(rows: dict[str, Any]) -> None:
        size = max(row["data_offsets"][1] for row in rows.values() if "data_offsets" in row)
        rows[EMBED]["data_offsets"] = change(*rows[EMBED]["data_offsets"], size)

    return header(changed)


def share_bytes(rows: dict[str, Any]) -> None:
    rows[NORMS[0]]["data_offsets"] = rows[NORMS[1]]["data_offsets"]


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the first shard's tensors and keep the index in step with it."""

    def damage(folder: Path) -> None:
        held = load_file(folder / FIRST)
        change(held)
        save_file(held, folder / FIRST)
        index = json.loads((folder / INDEX).read_text())
        kept = {key: name for key, name in index["weight_map"].items() if name != FIRST}
        index["weight_map"] = kept | dict.fromkeys(held, FIRST)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def only_shard(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors of a checkpoint that is one file."""

    def damage(folder: Path) -> None:
        held = load_file(folder / ONLY)
        change(held)
        save_file({key: t.clone().contiguous() for key, t in held.items()}, folder / ONLY)

    return damage


def embed(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(lambda held: held.update({EMBED: change(held[EMBED]).contiguous()}))


def listed(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the index's weight_map."""
    return json_file(INDEX, lambda index: change(index["weight_map"]))


def listed_as(name: object) -> Damage:
    """Let the index say that the embedding is in `name`."""
    return listed(lambda weight_map: weight_map.update({EMBED: name}))


def shard_called(name: str) -> Damage:
    """Rename the first shard, in the index too."""

    def damage(folder: Path) -> None:
        (folder / FIRST).rename(folder / name)
        index = json.loads((folder / INDEX).read_text())
        for key, shard in index["weight_map"].items():
            index["weight_map"][key] = name if shard == FIRST else shard
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def config(dotted: str, value: object) -> Damage:
    return put("config.json", dotted, value)


# ---------------------------------------------------------------- an artefact


def manifest(dotted: str, value: object) -> Damage:
    return put("manifest.json", dotted, value)


def sealed(folder: Path) -> None:
    """Give the manifest the digest of what it says now, as whoever edits it can."""
    values = json.loads((folder / "manifest.json").read_text())
    put("manifest.json", "digest", digest_of(values))(folder)


def listed_again(folder: Path, *names: str) -> None:
    """Let the manifest say the size and hash that the files `names` have now, and seal it."""
    now = {name: file_of(folder / name).model_dump() for name in names}
    json_file("manifest.json", lambda held: held["files"].update(now))(folder)
    sealed(folder)


def reference(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change where the manifest says that the embedding's bytes are."""
    return json_file(
        "manifest.json", lambda values: change(values["weights"]["tensors"]["embed.weight"])
    )


def tensor_refs(change: Callable[[dict[str, Any]], object]) -> Damage:
    return json_file("manifest.json", lambda values: change(values["weights"]["tensors"]))


def other_header(folder: Path) -> None:
    """Another header of the same length: two tensors of one shape have changed places."""

    def swap(rows: dict[str, Any]) -> None:
        a, b = (rows[name] for name in NORMS)
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]

    raw = (folder / FIRST).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    rows = json.loads(raw[8 : 8 + length])
    swap(rows)
    changed = json.dumps(rows, separators=(",", ":")).encode().ljust(length)
    assert len(changed) == length and changed != raw[8 : 8 + length]
    (folder / FIRST).write_bytes(raw[:8] + changed + raw[8 + length :])


# ---------------------------------------------------------------- a build


def raising(error: BaseException, stage: str) -> Callable[[str, int, int], None]:
    """A progress callback that raises `error` when `stage` begins."""

    def progress(name: str, done: int, total: int) -> None:
        if name.split()[0] == stage:
            raise error

    return progress
