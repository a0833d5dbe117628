"""Find the bytes of the weights that a graph takes as inputs.

They are those of a stored tensor, of a slice of one, or of several joined tensors.
"""

from collections.abc import Iterable, Mapping

from moec.artefact.manifest import Manifest
from moec.exporters.onnx.external_data import entry_of
from moec.spec.model import ModelSpec
from moec.spec.names import of_moe
from moec.weights.joined import ORT_CUDA, in_one_piece, joined_tensors
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry


def weights_of(
    manifest: Manifest, stored: Mapping[str, TensorEntry], names: list[str]
) -> dict[str, tuple[TensorEntry, ...]]:
    """The stored tensors whose bytes, one after another, make up each weight of `names`.

    A name is that of a stored tensor, of an expert in one ("TENSOR[INDEX]"), or of a joined tensor
    of the MoE plugin or of fused ops; see `moec.weights.joined`. Names without stored bytes are
    left out.
    """
    joined, found = _joined_inputs(manifest), dict[str, tuple[TensorEntry, ...]]()
    for name in names:
        entry = entry_of(name, stored)
        if name in joined:
            found[name] = tuple(stored[part] for part in joined[name])
        elif entry:
            found[name] = (entry,)
    return found


def pieces_of(
    spec: ModelSpec, packings: Iterable[Packing], stored: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Where the weights of fused ops are that are one piece of a file each, by name.

    `packings` say under which names parameters are stored.
    """
    as_stored = _stored_names(spec, packings)
    found = {}
    for name, joined in joined_tensors(spec).items():
        parts = [stored.get(as_stored.get(source, source)) for source in joined.sources]
        known = [each for each in parts if each is not None]
        whole = in_one_piece(name, joined, known) if len(known) == len(parts) else None
        if whole:
            found[name] = whole
    return found


def _stored_names(spec: ModelSpec, packings: Iterable[Packing]) -> dict[str, str]:
    return {each.source: each.names(spec.stored(each.source))[0] for each in packings}


def _joined_inputs(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """The joined tensors that the dialect takes, and the stored tensors of each, by name."""
    if manifest.dialect not in ("tensorrt-plugin", ORT_CUDA):
        return {}
    spec, of_all = manifest.spec, manifest.dialect == ORT_CUDA
    as_stored = _stored_names(spec, manifest.packings.values())
    return {
        name: tuple(as_stored.get(source, source) for source in each.sources)
        for name, each in joined_tensors(spec).items()
        if of_all or (of_moe(name) and len(each.sources) > 1)
    }
