"""Read an artefact from disk, find its weights, and notice when its files have changed."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from moec.artefact.card import CARD, read_card
from moec.artefact.manifest import NAME, Engine, File, Manifest, digest_of
from moec.artefact.opening.rules import check_manifest
from moec.artefact.opening.shards import checkpoint_of, find_shard
from moec.artefact.stored import misplaced, stored_kinds
from moec.artefact.targets import find_target
from moec.artefact.weight_hashes import verify_weights
from moec.spec import names
from moec.spec.bounded.own import find_own, is_regular, own_file, put
from moec.spec.errors import refuse
from moec.spec.fields import read_own_json
from moec.spec.hf.forms import checkpoint_folder
from moec.spec.parameters import parameters
from moec.spec.tensors import tensors
from moec.weights.packed.hashed import file_sha256
from moec.weights.packing import Packed, Packing
from moec.weights.shard import TensorEntry, read_shard

#: where the bytes of a parameter are: one stored tensor, or several that a packing describes
Entry = TensorEntry | Packed


@dataclass(frozen=True, slots=True)
class Artefact:
    """The folder that `export` wrote, and its manifest.

    Attributes:
        path: the folder.
        manifest: the manifest in it.
        weights_from: the folder that the user named for weights that are not in the artefact.
        trust_engines: whether the user lets TensorRT engines run that were not built here.
        content: the digest of the manifest as it was read from disk. It differs from
            `manifest.digest` if the file has changed since it was written.
    """

    path: Path
    manifest: Manifest
    weights_from: Path | None = None
    trust_engines: bool = False
    content: str | None = None

    @property
    def model(self) -> Path:
        """The decoder's file."""
        return self.graph("model")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts whose graphs are files: "model", "vision", "mtp", "genai/model"."""
        return tuple(name.removesuffix(self._suffix) for name in self.graphs)

    @property
    def graphs(self) -> tuple[str, ...]:
        """The names of the files of all parts."""
        return tuple(name for name in self.manifest.files if name.endswith(self._suffix))

    def graph(self, part: str) -> Path:
        """The file of a part: "model", "vision" or "mtp"."""
        return self.path / f"{part}{self._suffix}"

    @property
    def _suffix(self) -> str:
        return find_target(self.manifest.target).suffix

    @property
    def weights_folder(self) -> Path:
        """The folder to which the names of shards in the manifest are relative."""
        folder = self.manifest.weights.folder
        return self.path if folder is None else self.weights_from or Path(folder)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint's folder, if the user named it or has built or bound from it before."""
        return checkpoint_of(self.path, self.manifest, self.weights_from)

    def shard(self, name: str) -> Path:
        """The real path of a shard, which may be missing.

        Raises:
            MoecError: the shard is in a folder that this user has not allowed.
        """
        return find_shard(self.path, self.manifest.weights, name, self.weights_from)

    def entries(self) -> dict[str, Entry]:
        """Each parameter by name: one tensor, as the checkpoint stores it, or packed tensors.

        Raises:
            MoecError: the artefact is unbound, or a shard is missing or has changed.
        """
        stored, spec = self.stored(), self.manifest.spec
        found: dict[str, Entry] = {name: stored[name] for name in tensors(spec) if name in stored}
        for name, packing in self.manifest.rewritten.items():
            if packing.fp8 and packing.arrange == "rows":  # the graph itself dequantises these
                continue
            shape = parameters(spec)[name]
            parts = tuple(stored[part] for part in packing.names(spec.stored(name)))
            whole = Packed(packing, shape, parts)
            if packing.fp8 == "block":  # the scales are turned as the values are
                scale = names.scale_of(name)
                how = Packing(source=scale, arrange=packing.arrange, dtype=packing.dtype)
                found[scale] = Packed(how, tensors(spec)[scale].shape, parts[1:])
            found |= whole.in_parts() if packing.group else {name: whole}
        return found

    def stored(self) -> dict[str, TensorEntry]:
        """Each stored tensor by name: its shape, its dtype, and the place of its bytes in a shard.

        The shards on disk are checked first: their sizes, and the hashes of their headers.

        Raises:
            MoecError: the artefact is unbound, or a shard is missing or has changed.
        """
        weights, spec = self.manifest.weights, self.manifest.spec
        if weights.mode == "unbound":
            refuse(
                self.path,
                "an artefact without weights",
                "bound weights",
                f"moec bind {self.path} --checkpoint DIR",
            )
        paths = {name: self.shard(name) for name in weights.shards}
        headers: dict[str, dict[str, TensorEntry]] = {}
        for name, expected in weights.shards.items():
            path = paths[name]
            found = read_shard(path) if is_regular(path) else None
            if not found or (found.size, found.header_sha256) != (
                expected.size,
                expected.header_sha256,
            ):
                refuse(
                    path,
                    "no such file" if found is None else "another size or header",
                    "the shard that this artefact was bound to",
                    f"moec bind {self.path} --checkpoint DIR"
                    + (", or name its folder: --weights-from DIR" if weights.folder else ""),
                )
            headers[name] = found.tensors
        kinds = stored_kinds(spec, self.manifest.packings)
        odd = misplaced(self.manifest, kinds, headers)
        if odd:
            refuse(
                f"{self.path / NAME}: weights.tensors.{min(odd)}",
                "a place that does not fit the spec and the shards",
                "each parameter of the spec at the place of its tensor in a shard's header",
                "build the artefact again",
            )
        return {
            name: TensorEntry(
                name,
                kinds[name][1],
                kinds[name][0],
                paths[ref.file],
                ref.offset,
                ref.length,
            )
            for name, ref in weights.tensors.items()
        }

    def companion(self, name: str) -> Path | None:
        """The path of file `name`, such as a tokenizer, in the artefact or else in its checkpoint.

        None if neither folder has the file, or only a checkpoint that this user has not allowed.

        Raises:
            MoecError: the file is a link that leads out of its folder.
        """
        copy_it = f"put a copy of the file into {self.path}"
        found = find_own(self.path, name, copy_it)
        if found is None and self.checkpoint:
            found = find_own(checkpoint_folder(self.checkpoint) or self.checkpoint, name, copy_it)
        return found


def open_artefact(
    path: str | Path, weights_from: str | Path | None = None, trust_engines: bool = False
) -> Artefact:
    """Open the artefact at `path`: read its manifest, and check its files by their sizes.

    `weights_from` and `trust_engines` are those of `Artefact`.

    Raises:
        MoecError: `path` is not an artefact, another version of moec wrote it, or a file is missing
            or has another size.
    """
    path = Path(path)
    if not (path / NAME).is_file():
        refuse(path, f"no {NAME}", "a folder that build wrote", "moec build --help")
    values = read_own_json(path / NAME)
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        refuse(
            f"{path / NAME}: {'.'.join(map(str, first['loc']))}",
            first["msg"],
            "a manifest of this version of moec",
            "build the artefact again",
        )
    find_target(manifest.target, f"{path / NAME}: target", "build the artefact again")
    check_manifest(path, manifest)
    if bool(manifest.spec.vision) != bool(manifest.vision):
        refuse(
            f"{path / NAME}: vision",
            "a model with a vision tower, an artefact without"
            if manifest.spec.vision
            else "a model without a vision tower, an artefact with one",
            "an artefact of the whole model; older versions built the decoder alone",
            "build the artefact again",
        )
    for name, expected in manifest.files.items():
        file = own_file(path / name, path, f"put a copy of the file into {path}")
        size = file.stat().st_size if file.is_file() else None
        if size != expected.size:
            refuse(
                path / name,
                f"{size} bytes",
                f"{expected.size} bytes",
                "build the artefact again",
            )
    named = named_folder(weights_from)
    return Artefact(path, manifest, named, trust_engines, digest_of(values))


def named_folder(weights_from: str | Path | None) -> Path | None:
    """The folder that the user named for weights, if it is one.

    Raises:
        MoecError: there is no such folder.
    """
    if weights_from is None or os.path.isdir(weights_from):
        return None if weights_from is None else Path(weights_from)
    refuse(
        f"--weights-from {weights_from}", "no such folder", "a folder with weights", "correct it"
    )


def write_manifest(path: Path, manifest: Manifest, folder: int | None = None) -> Manifest:
    """Write the manifest of the artefact at `path` in one step: readers see the old or the new one.

    With the descriptor `folder` of the artefact's folder, a build that puts another folder there at
    this moment keeps its own manifest.

    Returns:
        The manifest with its digest, as it was written.
    """
    sealed = manifest.sealed()
    at = folder if folder is not None else os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        put(at, NAME, sealed.to_json())
    finally:
        if folder is None:
            os.close(at)
    return sealed


def file_of(path: Path) -> File:
    """The size and the SHA-256 hash of a file."""
    return File(size=path.stat().st_size, sha256=file_sha256(path))


def check_graph(artefact: Artefact, part: str) -> None:
    """Refuse a part whose file is damaged, for engines that build its graph from the spec.

    Raises:
        MoecError: the file is not the one that the manifest lists (exit code 1).
    """
    file = artefact.graph(part)
    found, expected = file_of(file), artefact.manifest.files.get(file.name)
    if found != expected:
        refuse(
            file,
            f"sha256 {found.sha256}",
            expected.sha256 if expected else "a file that the manifest lists",
            "build the artefact again",
            exit_code=1,
        )


def check_digest(artefact: Artefact) -> None:
    """Refuse a manifest whose content is not that of its digest; one without a digest passes.

    Raises:
        MoecError: the manifest has changed since it was written (exit code 1).
    """
    expected = artefact.manifest.digest
    if expected and artefact.content and expected != artefact.content:
        refuse(
            artefact.path / NAME,
            f"content of SHA-256 {artefact.content}",
            f"{expected}, as it was written",
            "build the artefact again",
            exit_code=1,
        )


def check_files(artefact: Artefact, names: Iterable[str] | None = None) -> None:
    """Hash files that the build wrote: `names`, or all files but the weights and the engines.

    Raises:
        MoecError: a file has changed; the message names the first one (exit code 1).
    """
    written = artefact.manifest.files
    for name in written if names is None else names:
        path, expected = artefact.path / name, written[name].sha256
        found = file_sha256(path)
        if found != expected:
            refuse(path, f"sha256 {found}", expected, "build the artefact again", exit_code=1)


class Verified(NamedTuple):
    """The files of an artefact that were hashed, by name, and what was not, for people to read."""

    hashed: tuple[str, ...]
    not_hashed: tuple[str, ...]


def verify_files(artefact: Artefact) -> Verified:
    """Hash all that has a hash in the manifest, and check the sizes and headers of the weights.

    Raises:
        MoecError: something has changed; the message names the first such thing (exit code 1).
    """
    manifest = artefact.manifest
    check_digest(artefact)
    check_files(artefact)
    for engine in manifest.engines.values():
        check_engine(artefact, engine, whole=True)
    engines = {name for engine in manifest.engines.values() for name in engine.files}
    shards = manifest.weights.shards
    weights: set[str] = set()
    if manifest.weights.mode != "unbound":
        artefact.stored()
        weights = verify_weights(manifest.weights, {name: artefact.shard(name) for name in shards})
    card = _check_card(artefact)
    known = {NAME, *card, *manifest.files, *engines, *shards}
    here = {p.relative_to(artefact.path).as_posix() for p in artefact.path.rglob("*")}
    others = sorted(name for name in here - known if not (artefact.path / name).is_dir())
    return Verified(
        (*((NAME,) if manifest.digest else ()), *manifest.files, *card, *sorted(engines | weights)),
        (
            *(() if manifest.digest else (f"{NAME}: it has no digest",)),
            *(f"{name}: its size and header are right" for name in sorted(shards.keys() - weights)),
            *(f"{name}: its section of the proof, and what follows" for name in card),
            *(f"{name}: the build did not write it" for name in others),
        ),
    )


def _check_card(artefact: Artefact) -> list[str]:
    """The name of the model card, if there is one, of which a hash protects all but its proof.

    Raises:
        MoecError: the card has changed (exit code 1).
    """
    expected, path = artefact.manifest.weights.card, artefact.path / CARD
    if expected is None or not os.path.lexists(path):
        return []
    card = read_card(artefact.path)
    if card is None or card.sha256 != expected:
        found = "other text than the build wrote there, besides its proof"
        expected = "the text whose hash is in manifest.json"
        refuse(path, found, expected, "build the artefact again", exit_code=1)
    return [CARD]


def check_engine(artefact: Artefact, engine: Engine, whole: bool = False) -> None:
    """Refuse a TensorRT engine whose files have changed since the build wrote them.

    The sizes are compared, and the hashes of the plugins, which are small. `whole` asks for the
    hashes of the engines too, which hold weights.

    Raises:
        MoecError: a file has changed; the message names the first one (exit code 1).
    """
    for name, expected in engine.files.items():
        path = artefact.path / name
        size = path.stat().st_size if path.is_file() else None
        hashed = whole or name != engine.file
        if size != expected.size or (hashed and file_of(path).sha256 != expected.sha256):
            found = "other bytes" if size == expected.size else f"{size} bytes"
            refuse(
                path,
                found,
                f"{expected.size} bytes, as they were written",
                f"moec engine {artefact.path}",
                exit_code=1,
            )
