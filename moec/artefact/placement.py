"""Place the weights of an artefact: leave them in the checkpoint, link, copy or pack them."""

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Self, cast

import torch
from torch import Tensor

from moec.artefact.manifest import (
    Manifest,
    ShardRef,
    TensorHash,
    TensorRef,
    WeightMode,
    Weights,
)
from moec.artefact.stored import stored_kinds
from moec.artefact.weight_hashes import hash_files
from moec.spec.bounded.read import open_file
from moec.spec.errors import refuse
from moec.spec.hf.written import is_said
from moec.weights.checkpoint import Checkpoint
from moec.weights.packed.file import write_packed
from moec.weights.packed.journal import PACKED, Hash, discard
from moec.weights.packed.published import placed, under_our_names
from moec.weights.packed.shards import write_shards
from moec.weights.shard import TensorEntry, read_shard
from moec.weights.view import STORED, read_into

#: the chat templates that lie in files of their own, by the names that transformers has for them
TEMPLATES = {
    "default": "chat_template.jinja",
    "tool_use": "additional_chat_templates/tool_use.jinja",
}
#: files of a checkpoint that say how text and images become a model's inputs
INPUT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *TEMPLATES.values(),
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
#: files of a checkpoint that a runtime may need beside the weights
COMPANIONS = ("config.json", "generation_config.json", *INPUT_FILES)

#: bytes that are copied at once
BLOCK = 1 << 24

#: called with (stage, done, total) in the stage's own unit; it is called often and must be cheap
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Bound:
    """Weights that were placed for an artefact.

    Attributes:
        entries: stored tensors by name, in files below `root`.
        root: the folder to which the graph's external data is relative.
        weights: the same for the manifest.
        copied: bytes that were copied unchanged.
        packed: bytes that were packed.
        read: bytes of the checkpoint that packing read.
    """

    entries: dict[str, TensorEntry]
    root: Path
    weights: Weights
    copied: int = 0
    packed: int = 0
    read: int = 0

    def seen_from(self, part: str) -> Self:
        """The same weights with the `root` of a part's graph, such as "genai/model"."""
        return replace(self, root=self.root / self.weights.data_folder(part))


def place(
    checkpoint: Checkpoint,
    entries: dict[str, TensorEntry],
    mode: str,
    folder: Path,
    progress: Progress,
    hashed: bool = False,
    below: str = ".",
) -> Bound:
    """Leave, link or copy the shards of `checkpoint`, as `mode` says; copy its companions.

    `folder` is the artefact's folder while it is written; shards that are linked or copied go to
    its folder `below`. The result says where each parameter will be in the finished artefact. A
    copy is hashed while it is written; `hashed` asks for a hash of shards that are left or linked,
    which means to read all of them. The changes of adapters go into a copy.

    Raises:
        MoecError: the file system cannot hard-link, or a companion is a link that leads out of the
            checkpoint.
    """
    copied, sha256 = 0, dict[Path, str]()
    if hashed and mode != "copy":
        sha256 = hash_files([s.path for s in checkpoint.shards], partial(progress, "hash"))
    if mode == "in-place":
        root = Path(os.path.commonpath([shard.path.parent for shard in checkpoint.shards]))
        names = {shard.path: shard.path.relative_to(root).as_posix() for shard in checkpoint.shards}
        shown = str(root)
    else:
        root, shown = folder, None
        names = {
            shard.path: PurePosixPath(below, shard.name).as_posix() for shard in checkpoint.shards
        }
        for shard in checkpoint.shards:
            target = folder / names[shard.path]
            target.parent.mkdir(parents=True, exist_ok=True)
            if mode == "link":
                _link(shard.path, target)
            else:
                changed = [each for each in entries.values() if each.changes]
                own = [each for each in changed if each.file == shard.path]
                sha256[shard.path] = _copy(shard.path, target, progress, own)
                copied += shard.size
        copy_companions(checkpoint, folder)
    files = {file: root / name for file, name in names.items()}
    at_root = {name: entry.copied(files[entry.file]) for name, entry in entries.items()}
    refs = {
        name: TensorRef(file=names[entry.file], offset=entry.offset, length=entry.nbytes)
        for name, entry in entries.items()
    }
    shards = {
        names[shard.path]: ShardRef(
            size=shard.size, header_sha256=shard.header_sha256, sha256=sha256.get(shard.path)
        )
        for shard in checkpoint.shards
    }
    placed = cast(WeightMode, mode)
    return Bound(
        at_root, root, Weights(mode=placed, folder=shown, shards=shards, tensors=refs), copied
    )


def pack(
    checkpoint: Checkpoint,
    entries: dict[str, TensorEntry],
    manifest: Manifest,
    folder: Path,
    progress: Progress,
    constants: dict[str, Tensor],
    below: str = ".",
) -> Bound:
    """Write every weight, in the layout that the graph reads.

    FP8 that other engines know goes into the shards of a checkpoint in `folder`. Everything else
    goes into one file, and so do `constants`, static scales by name. It is written in `folder`,
    where a build that is killed leaves it, and moved to the folder `below` when it is complete. The
    companion files are copied to `folder`.
    """
    copy_companions(checkpoint, folder)
    stage = partial(progress, "pack")
    hashes: dict[str, Hash] = {}
    places = placed(manifest.spec, manifest.packings) if is_said(manifest.spec) else None
    if places:
        files, read = write_shards(folder, manifest.packings, entries, places, stage, hashes)
        below = "."
    else:
        files = [PACKED]
        path = folder / PACKED
        discard(folder, (PACKED,))
        read = write_packed(path, manifest.packings, entries, stage, constants, hashes)
        (folder / below).mkdir(exist_ok=True)
        path.rename(folder / below / PACKED)
    shards = {PurePosixPath(below, file).as_posix(): folder / below / file for file in files}
    headers = {name: read_shard(path) for name, path in shards.items()}
    kinds = stored_kinds(manifest.spec, manifest.packings)
    tensors: dict[str, tuple[str, TensorEntry]] = {}
    for name, header in headers.items():
        there = header.tensors
        if places:
            there = under_our_names(there, places, kinds)
        tensors |= {each: (name, entry) for each, entry in there.items()}
    refs = {
        tensor: TensorRef(file=name, offset=entry.offset, length=entry.nbytes)
        for tensor, (name, entry) in tensors.items()
    }
    kept = {name: TensorHash(sha256=h.sha256, pieces=h.pieces) for name, h in hashes.items()}
    return Bound(
        {tensor: entry for tensor, (_, entry) in tensors.items()},
        folder,
        Weights(
            mode="pack",
            shards={
                name: ShardRef(size=header.size, header_sha256=header.header_sha256)
                for name, header in headers.items()
            },
            tensors=refs,
            hashes=dict(sorted(kept.items())),
            published=places is not None,
        ),
        packed=sum(header.size for header in headers.values()),
        read=read,
    )


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the files that lie beside the weights.

    Raises:
        MoecError: one of them is a link that leads out of the checkpoint, or cannot be read.
    """
    for name in COMPANIONS:
        if source := checkpoint.companion(name):
            (folder / name).parent.mkdir(exist_ok=True)
            with open_file(source) as file, (folder / name).open("wb") as copy:
                shutil.copyfileobj(file, copy)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        refuse(
            f"--weights link: {source}",
            error.strerror or error,
            "weights on the same file system as --out",
            "use --weights copy, or an --out beside the checkpoint",
        )


def _copy(
    source: Path, target: Path, progress: Progress, changed: Iterable[TensorEntry] = ()
) -> str:
    """Copy a file, with the tensors `changed` as adapters change them.

    Returns the SHA-256 of what was written.
    """
    size, done, digest = source.stat().st_size, 0, hashlib.sha256()
    with (
        source.open("rb") as reader,
        target.open("wb") as writer,
        ThreadPoolExecutor(1) as beside,
    ):
        for data in _blocks(reader, size, changed):
            hashing = beside.submit(digest.update, data)  # while the block is written
            writer.write(data)
            hashing.result()
            done += len(data)
            progress(f"copy {source.name}", done, size)
    return digest.hexdigest()


def _blocks(reader: BinaryIO, size: int, changed: Iterable[TensorEntry]) -> Iterator[bytes]:
    """The bytes of a file of `size` bytes in blocks, with the tensors `changed` merged."""
    at = 0
    for entry in sorted(changed, key=lambda each: each.offset):
        yield from _plain(reader, at, entry.offset)
        rows = max(1, BLOCK // (entry.nbytes // math.prod(entry.shape[:-1])))
        for index in range(math.prod(entry.shape[:-2])):
            for start in range(0, entry.shape[-2], rows):
                stop = min(start + rows, entry.shape[-2])
                part = torch.empty(stop - start, entry.shape[-1], dtype=STORED[entry.dtype])
                read_into(entry, (index * entry.shape[-2] + start) * entry.shape[-1], part)
                if not bool(part.isfinite().all()):
                    refuse(
                        f"{entry.file}: {entry.name}",
                        f"values that {entry.dtype} cannot hold, once the adapters are added",
                        "finite weights",
                        "check the adapters, or use --weights pack with another --precision",
                    )
                yield part.flatten().view(torch.uint8).numpy().tobytes()
        at = entry.offset + entry.nbytes
    yield from _plain(reader, at, size)


def _plain(reader: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    reader.seek(start)
    while start < stop and (data := reader.read(min(BLOCK, stop - start))):
        start += len(data)
        yield data
