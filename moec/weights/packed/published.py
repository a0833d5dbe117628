"""The names under which other engines know what a packed file holds.

moec packs the experts of a layer as one tensor [expert, out, in], with gate before up. So each
expert's matrix is a slice of it without a gap, and a header may list the slices as tensors of their
own: the names change and the bytes do not.

    packed tensor                  published tensors, in the order of its bytes
    layers.{i}.moe.gate_up         experts.0.gate_proj.weight, experts.0.up_proj.weight, ...
    layers.{i}.moe.gate_up_scale   experts.0.gate_proj.weight_scale, ...
    layers.{i}.attn.q.weight       self_attn.q_proj.weight

A scale for each output is [out, 1], as compressed-tensors stores it, and one for all is [1]. 4-bit
integers have the sizes of each matrix besides, which nobody needs and other engines look for.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from moec.spec import names
from moec.spec.hf.names import in_groups
from moec.spec.hf.written import published_spec
from moec.spec.model import ModelSpec
from moec.spec.parameters import Shape, parameters
from moec.spec.scheme import STATIC
from moec.spec.tensors import in_words, quantized
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry, nbytes


class Part(NamedTuple):
    """A tensor of a checkpoint: its key, and how the header describes it."""

    key: str
    shape: Shape
    dtype: str

    def like(self, dtype: str) -> "Part":
        """The same of another type, unless it holds words of 4-bit integers."""
        return self if self.dtype == "int32" else self._replace(dtype=dtype)


#: the tensors that a packed tensor consists of, in order
Published = tuple[Part, ...]
#: bytes of a shard; a layer's experts stay in one file, which may then be larger
SHARD_BYTES = 5 * 10**9


def published(spec: ModelSpec, packings: Mapping[str, Packing]) -> dict[str, Published]:
    """The published tensors of each packed tensor, for a checkpoint that `spec` describes.

    The keys of `packings` are the names of the packed tensors that hold the values.
    """
    rules, table = quantized(spec), _table(spec)

    def parts(names_: Sequence[str], dtype: str) -> Published:
        """The tensors of these names, or those of each expert in turn if they are patterns."""
        rows = [(table[name], names.EACH in name) for name in names_]
        if not any(pattern for _, pattern in rows):
            return tuple(part.like(dtype) for part, _ in rows)
        halves = [(part.key.partition(names.EACH), part.like(dtype)) for part, _ in rows]
        return tuple(
            Part(f"{start}{expert}{end}", part.shape, part.dtype)
            for expert in range(spec.text.expert_count)
            for (start, _, end), part in halves
        )

    found: dict[str, Published] = {}
    for name, packing in packings.items():
        source = packing.source
        own = [source] if source in table else list(names.separate(source, names.EACH))
        if source not in rules:
            found[name] = parts(own, packing.dtype)
            continue
        values, scales = packing.names(packing.dtype)
        found[values] = parts(own, "fp8")
        found[scales] = parts([names.scale_of(each) for each in own], packing.dtype)
        if rules[source].inputs in STATIC:
            inputs = [names.input_scale_of(each) for each in own]
            found[names.input_scale_of(source)] = parts(inputs, packing.dtype)
        if packing.bits:
            stems = (each.key.removesuffix("_packed") for each in found[values])
            sizes = tuple(Part(f"{stem}_shape", (2,), "int64") for stem in stems)
            found[sizes_of(source)] = sizes
    return found


def _table(spec: ModelSpec) -> dict[str, Part]:
    """How a checkpoint of `spec` has each stored tensor, by our name; experts are patterns."""
    found: dict[str, Part] = {}
    for group, theirs in in_groups(spec):
        for (name, kind), key in zip(group.kinds.items(), theirs, strict=True):
            few = names.is_scale(name) and len(kind.shape) < 2
            shape, dtype = in_words(kind) if kind.dtype == "uint8" else kind
            found[name] = Part(key, (*shape, 1) if few else shape, dtype)
    return found


def sizes_of(parameter: str) -> str:
    """The name of what a checkpoint says of the sizes of 4-bit integers: [parts, 2]."""
    return f"{parameter}.sizes"


def placed(spec: ModelSpec, packings: Mapping[str, Packing]) -> dict[str, Published] | None:
    """The published tensors of each tensor that a build packs for `spec`, whose weights were wide.

    None if the build writes tensors of our names (`published_spec`), or not each expert as [out,
    in] where a checkpoint has it so.
    """
    told = published_spec(spec)
    if told is None or not packings:
        return None
    table, shapes, rules = _table(told), parameters(told), quantized(told)
    for packing in packings.values():
        if (packing.source in rules) != bool(packing.fp8 or packing.bits):
            return None
        apart = packing.source not in table
        if len(shapes[packing.source]) == 3 and apart != (packing.arrange == "transpose"):
            return None
    return published(told, packings)


def under_our_names(
    tensors: Mapping[str, TensorEntry],
    places: Mapping[str, Published],
    kinds: Mapping[str, tuple[tuple[int, ...], str]],
) -> dict[str, TensorEntry]:
    """The packed tensors of a shard whose header lists `tensors`; `kinds` are shapes and types.

    A tensor whose parts are not all there, or do not lie one after another, is left out.
    """
    found = (
        _whole(name, kinds[name], [(tensors.get(part.key), part) for part in parts])
        for name, parts in places.items()
        if name in kinds
    )
    return {each.name: each for each in found if each}


def _whole(
    name: str,
    kind: tuple[tuple[int, ...], str],
    parts: Sequence[tuple[TensorEntry | None, Part]],
) -> TensorEntry | None:
    first, at = parts[0][0], 0
    if first is None:
        return None
    for found, part in parts:
        expected = part.shape, part.dtype, first.offset + at
        if found is None or (found.shape, found.dtype, found.offset) != expected:
            return None
        at += found.nbytes
    return TensorEntry(name, kind[1], kind[0], first.file, first.offset, at)


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
