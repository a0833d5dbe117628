"""Read an artefact from disk, find its weights, and notice when its files have changed."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from moec.artefact.manifest import NAME, Engine, File, Manifest
from moec.artefact.opening.rules import check_manifest
from moec.artefact.opening.shards import checkpoint_of, find_shard, holds, keys_in_shards
from moec.artefact.targets import find_target
from moec.spec.errors import refuse
from moec.spec.fields import read_json
from moec.spec.model import ModelSpec
from moec.spec.parameters import parameters
from moec.spec.tensors import Kind, tensors
from moec.weights.packing import Packed, Packing
from moec.weights.shard import TensorEntry, read_shard
from moec.weights.trust.links import is_regular, own_file

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
    """

    path: Path
    manifest: Manifest
    weights_from: Path | None = None
    trust_engines: bool = False

    @property
    def model(self) -> Path:
        """The decoder's file."""
        return self.graph("model")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts whose graphs are files in the folder: "model", "vision", "genai/model"."""
        end = self._suffix
        return tuple(n.removesuffix(end) for n in self.manifest.files if n.endswith(end))

    def graph(self, part: str) -> Path:
        """The file of a part: "model" or "vision"."""
        return self.path / f"{part}{self._suffix}"

    @property
    def _suffix(self) -> str:
        return find_target(self.manifest.target).suffix

    @property
    def weights_folder(self) -> Path:
        """The folder to which the locations of the graph's external data are relative."""
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
            parts = tuple(stored[part] for part in packing.names(spec.dtype))
            found[name] = Packed(packing, shape, parts)
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
        kinds, keys = stored_kinds(spec, self.manifest.packings), keys_in_shards(self.manifest)
        odd = set(kinds) ^ set(weights.tensors) or {
            name
            for name, ref in weights.tensors.items()
            if ref.file not in headers
            or not holds(name, ref, kinds[name], headers[ref.file], keys.get(name, name))
        }
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
        if (self.path / name).is_file():
            return own_file(self.path / name, self.path, self.weights_from, copy_it)
        folder = self.checkpoint
        if folder and (folder / name).is_file():
            return own_file(folder / name, folder, self.weights_from, copy_it)
        return None


def stored_kinds(
    spec: ModelSpec, packings: Mapping[str, Packing]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every stored tensor of `spec`, by name.

    A packing replaces a parameter's tensor by the tensors that it writes. The other parameters are
    stored as the checkpoint has them.
    """
    shapes, found = parameters(spec), {**tensors(spec)}
    for packing in packings.values():
        found.pop(packing.source, None)
        names, kinds = packing.names(spec.dtype), packing.shapes(shapes[packing.source])
        found.update(zip(names, map(Kind._make, kinds), strict=True))
    return {name: (kind.shape, kind.dtype) for name, kind in found.items()}


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
    try:
        manifest = Manifest.model_validate(read_json(path / NAME))
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
        file = own_file(path / name, path, None, f"put a copy of the file into {path}")
        size = file.stat().st_size if file.is_file() else None
        if size != expected.size:
            refuse(
                path / name,
                f"{size} bytes",
                f"{expected.size} bytes",
                "build the artefact again",
            )
    return Artefact(path, manifest, named_folder(weights_from), trust_engines)


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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder`/manifest.json in one step: a reader sees the old file or the new one."""
    draft = folder / f".{NAME}.{os.getpid()}"
    draft.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    draft.replace(folder / NAME)


def file_of(path: Path) -> File:
    """The size and the SHA-256 hash of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(size=path.stat().st_size, sha256=digest)


def verify_files(artefact: Artefact) -> None:
    """Hash every file that the build wrote, and check the shards of the weights.

    Raises:
        MoecError: a file has changed; the message names the first one (exit code 1).
    """
    for name, expected in artefact.manifest.files.items():
        found = file_of(artefact.path / name).sha256
        if found != expected.sha256:
            refuse(
                artefact.path / name,
                f"sha256 {found}",
                expected.sha256,
                "build the artefact again",
                exit_code=1,
            )
    for engine in artefact.manifest.engines.values():
        check_engine(artefact, engine, whole=True)
    if artefact.manifest.weights.mode != "unbound":
        artefact.stored()


def check_engine(artefact: Artefact, engine: Engine, whole: bool = False) -> None:
    """Refuse a TensorRT engine whose files have changed since the build wrote them.

    The sizes are compared, and the hashes too if `whole`.

    Raises:
        MoecError: a file has changed; the message names the first one (exit code 1).
    """
    for name, expected in engine.files.items():
        path = artefact.path / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected.size or (whole and file_of(path).sha256 != expected.sha256):
            found = "other bytes" if size == expected.size else f"{size} bytes"
            refuse(
                path,
                found,
                f"{expected.size} bytes, as they were written",
                f"moec engine {artefact.path}",
                exit_code=1,
            )
