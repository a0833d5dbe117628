"""The stored tensors of an artefact: what they are, and what its shards say of them."""

from collections.abc import Mapping

from moec.artefact.manifest import Manifest
from moec.artefact.opening.shards import holds, keys_in_shards
from moec.spec.model import ModelSpec
from moec.spec.parameters import parameters
from moec.spec.tensors import Kind, int4_tensors, tensors
from moec.weights.packed.published import placed, under_our_names
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry


def stored_kinds(
    spec: ModelSpec, packings: Mapping[str, Packing]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every stored tensor of `spec`, by name.

    A packing replaces a parameter's tensor by the tensors that it writes. The other parameters are
    stored as the checkpoint has them.
    """
    shapes, found = parameters(spec), {**tensors(spec)}
    for packing in packings.values():
        for part in int4_tensors(packing.source, shapes[packing.source]) if packing.group else ():
            found.pop(part, None)
        found.pop(packing.source, None)
        names = packing.names(spec.stored(packing.source))
        kinds = packing.shapes(shapes[packing.source])
        found.update(zip(names, map(Kind._make, kinds), strict=True))
    return {name: (kind.shape, kind.dtype) for name, kind in found.items()}


def misplaced(
    manifest: Manifest,
    kinds: Mapping[str, tuple[tuple[int, ...], str]],
    headers: dict[str, dict[str, TensorEntry]],
) -> set[str]:
    """The tensors that are not where the manifest says, or not of the kind that the spec says.

    `kinds` are the stored tensors of the spec, `headers` the tensors of each shard.
    """
    weights, keys = manifest.weights, keys_in_shards(manifest)
    if weights.published:
        places = placed(manifest.spec, manifest.packings) or {}
        headers = {name: under_our_names(each, places, kinds) for name, each in headers.items()}
    hashes = weights.hashes
    return set(kinds) ^ set(weights.tensors) or {
        name
        for name, ref in weights.tensors.items()
        if ref.file not in headers
        or not holds(name, ref, kinds[name], headers[ref.file], keys.get(name, name))
        or (name in hashes and hashes[name].pieces not in (1, *kinds[name][0][:1]))
    }
