"""Find the shards of an artefact where this user lets it look, and its tensors inside them.

The manifest says where the weights lie, and a stranger may have written it. So a shard must lie in
the artefact, in a folder that this user built or bound from, or in one that the user names now.
Each tensor must be a tensor of its shard's own header, and not any range of bytes.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote

from moec.artefact.manifest import Manifest, TensorRef, Weights
from moec.spec.bounded.own import blobs_of, inside, is_regular
from moec.spec.errors import refuse
from moec.spec.hf.forms import split_list
from moec.spec.hf.names import DECODER, keys
from moec.spec.names import is_scale
from moec.spec.tensors import Kind, in_words
from moec.weights.shard import TensorEntry
from moec.weights.trust.links import reachable
from moec.weights.trust.records import folder_is_allowed


def find_shard(path: Path, weights: Weights, name: str, named: Path | None) -> Path:
    """The real path of shard `name` of the artefact at `path`; no file need be there.

    `named` is the folder that the user named for the weights. The shard is looked up there instead
    of in the folder that the manifest names, since the checkpoint may have moved.

    Raises:
        MoecError: the shard is somewhere that this user has not allowed.
    """
    folder = Path(weights.folder or path)
    found = folder / name
    if named is not None and weights.folder is not None:
        blobs = blobs_of(named.resolve())
        places = [named / name, *([blobs / name] if blobs else ())]
        found = next((each for each in places if is_regular(each)), places[0])
    real = reachable(found, path, named)
    if real is None:
        there = folder if weights.folder else Path(found).resolve().parent
        refuse(
            path if weights.folder else found,
            f"weights in {there}, which this user neither built nor bound an artefact from",
            "weights in the artefact, or in a folder that you name",
            f"if you trust that folder: moec inspect {quote(str(path))} --verify "
            f"--weights-from {quote(str(there))}",
        )
    return real


def checkpoint_of(path: Path, manifest: Manifest, named: Path | None) -> Path | None:
    """The path of the checkpoint, if there is one and this user lets the artefact look there.

    It is in the folder that the user named for the weights, or else in the one in the manifest.
    Where that has two lists of weights, the path is that of the list that was chosen.
    """
    if manifest.checkpoint is None:
        return named
    folder, name = split_list(Path(manifest.checkpoint))
    if named is not None:
        return named / name
    allowed = inside(folder, path) or folder_is_allowed(Path(os.path.realpath(folder)))
    return folder / name if allowed else None


def holds(
    name: str,
    ref: TensorRef,
    kind: tuple[tuple[int, ...], str],
    tensors: Mapping[str, TensorEntry],
    key: str,
) -> bool:
    """Whether `ref` is exactly the place of tensor `key` in a shard's header, and has its kind.

    `tensors` are those of the shard. Formats differ in whether a scale keeps axes of size 1, and
    checkpoints of text alone in whether keys have the decoder's prefix. 4-bit integers are words in
    a checkpoint, and bytes in what moec packs.
    """
    entry = tensors.get(key) or tensors.get(DECODER + key)
    if entry is None or (entry.offset, entry.nbytes) != (ref.offset, ref.length):
        return False
    shape, dtype = kind
    found = entry.shape
    if is_scale(name):
        shape, found = (tuple(n for n in each if n != 1) for each in (shape, found))
    words = [in_words(Kind(shape, dtype))] if dtype == "uint8" else []
    return (found, entry.dtype) in [(shape, dtype), *words]


def keys_in_shards(manifest: Manifest) -> Mapping[str, str]:
    """The key of each stored tensor in the shard that holds it, by our name.

    A packed file uses our names. Other shards are the checkpoint's, and have its keys.
    """
    if manifest.weights.mode == "pack":
        return {name: name for name in manifest.weights.tensors}
    return keys(manifest.spec)
