"""The names under which other engines know what a packed file holds.

moec packs the experts of a layer as one tensor [expert, out, in], with gate before up. So each
expert's matrix is a slice of it without a gap, and a header may list the slices as tensors of their
own: the names change and the bytes do not.

    packed tensor                  published tensors, in the order of its bytes
    layers.{i}.moe.gate_up         experts.0.gate_proj.weight, experts.0.up_proj.weight, ...
    layers.{i}.moe.gate_up_scale   experts.0.gate_proj.weight_scale, ...
    layers.{i}.attn.q.weight       self_attn.q_proj.weight

A scale for each output is [out, 1], as compressed-tensors stores it.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby

from moec.spec import names
from moec.spec.hf.names import keys
from moec.spec.model import ModelSpec
from moec.spec.parameters import Shape
from moec.spec.tensors import quantized, tensors
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry, nbytes

#: the keys and the shapes of the tensors that a packed tensor consists of, in order
Published = tuple[tuple[str, Shape], ...]
#: bytes of a shard; a layer's experts stay in one file, which may then be larger
SHARD_BYTES = 5 * 10**9


def published(spec: ModelSpec, packings: Mapping[str, Packing]) -> dict[str, Published]:
    """The published tensors of each packed tensor, for a checkpoint that `spec` describes.

    The keys of `packings` are the names of the packed tensors that hold the values.
    """
    theirs, kinds, rules = keys(spec), tensors(spec), quantized(spec)

    def tensor(name: str) -> tuple[str, Shape]:
        shape = kinds[name].shape
        channel = names.is_scale(name) and len(shape) == 1
        return theirs[name], (*shape, 1) if channel else shape

    found: dict[str, Published] = {}
    for name, packing in packings.items():
        parts = [packing.source]
        if packing.source not in kinds:
            count = spec.text.expert_count
            parts = [p for e in range(count) for p in names.separate(packing.source, e)]
        found[name] = tuple(map(tensor, parts))
        if packing.source in rules:
            found[names.scale_of(packing.source)] = tuple(tensor(names.scale_of(p)) for p in parts)
    return found


def in_shards(
    packings: Mapping[str, Packing], entries: Mapping[str, TensorEntry]
) -> Iterator[dict[str, Packing]]:
    """The packings of each file of a checkpoint, about `SHARD_BYTES` in each.

    Tensors of one layer stay together.
    """

    def layer(item: tuple[str, Packing]) -> str:
        _, numbers = names.template(item[1].source)
        return numbers.get("i", "") if not names.of_vision(item[1].source) else "vision"

    held: dict[str, Packing] = {}
    used = 0
    for _, items in groupby(packings.items(), layer):
        own = dict(items)
        size = sum(_size(each, entries[each.source]) for each in own.values())
        if held and used + size > SHARD_BYTES:
            yield held
            held, used = {}, 0
        held |= own
        used += size
    yield held


def _size(packing: Packing, entry: TensorEntry) -> int:
    return sum(nbytes(*kind) for kind in packing.shapes(entry.shape))
