"""Where the bytes of an engine's weights are: stored tensors, slices of them, or several joined."""

from collections.abc import Mapping

from moec.artefact.manifest import Manifest
from moec.exporters.onnx.external_data import entry_of
from moec.weights.joined import joined_tensors
from moec.weights.shard import TensorEntry


def weights_of(
    manifest: Manifest, stored: Mapping[str, TensorEntry], names: list[str]
) -> dict[str, tuple[TensorEntry, ...]]:
    """The stored tensors that are, one after the other, the bytes of each of `names`.

    A name is that of a stored tensor, of an expert in it, "TENSOR[INDEX]", or, for the plugin, that
    of tensors that are joined: see `moec.weights.joined`.
    """
    joined, found = _joined_inputs(manifest), dict[str, tuple[TensorEntry, ...]]()
    for name in names:
        entry = entry_of(name, stored)
        if name in joined:
            found[name] = tuple(stored[part] for part in joined[name])
        elif entry:
            found[name] = (entry,)
    return found


def _joined_inputs(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """The tensors that the plugin takes, by name, and the stored ones that each is joined from."""
    if manifest.dialect != "tensorrt-plugin":
        return {}
    spec = manifest.spec
    as_stored = {each.source: each.names(spec.dtype)[0] for each in manifest.packings.values()}
    return {
        name: tuple(as_stored.get(piece, piece) for piece in each.sources)
        for name, each in joined_tensors(spec).items()
        if ".moe." in name and len(each.sources) > 1
    }
