"""Where each tensor of a packed file goes, and in which order the weights are packed."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moec.weights.packed.published import Part, Published
from moec.weights.packing import Packing
from moec.weights.shard import DTYPES, TensorEntry, nbytes
from moec.weights.view import name_of

_SAFETENSORS_TYPES = {ours: (theirs, size) for theirs, (ours, size) in DTYPES.items()}


def in_file_order(
    packings: Mapping[str, Packing], entries: Mapping[str, TensorEntry]
) -> list[tuple[str, Packing]]:
    """The packings, in the order of their sources on disk."""

    def place(item: tuple[str, Packing]) -> tuple[str, int]:
        entry = entries[item[1].source]
        return str(entry.file), entry.offset

    return sorted(packings.items(), key=place)


def layout(
    packings: Mapping[str, Packing],
    entries: Mapping[str, TensorEntry],
    constants: Mapping[str, Tensor],
    published: Mapping[str, Published] | None = None,
) -> tuple[bytes, dict[str, int], int]:
    """The header, the offset of each tensor, and the file's size, all in bytes.

    Tensors with the largest elements come first, so that every tensor is aligned. With `published`
    the header describes each tensor as those that it consists of.
    """
    kinds: dict[str, tuple[tuple[int, ...], str]] = {
        name: kind
        for packing in packings.values()
        for entry in [entries[packing.source]]
        for name, kind in zip(packing.names(entry.dtype), packing.shapes(entry.shape), strict=True)
    }
    kinds |= {name: (tuple(each.shape), name_of(each.dtype)) for name, each in constants.items()}
    rows: dict[str, dict[str, Any]] = {}
    offsets: dict[str, int] = {}
    if published is not None:
        rows["__metadata__"] = {"format": "pt"}  # transformers refuses a file without it
    at = 0
    parts = {
        name: published[name] if published is not None else (Part(name, *kind),)
        for name, kind in kinds.items()
    }
    for name in sorted(kinds, key=lambda name: -_SAFETENSORS_TYPES[parts[name][0].dtype][1]):
        offsets[name] = at
        for key, shape, dtype in parts[name]:
            end = at + nbytes(shape, dtype)
            rows[key] = {
                "dtype": _SAFETENSORS_TYPES[dtype][0],
                "shape": shape,
                "data_offsets": (at, end),
            }
            at = end
        assert at - offsets[name] == nbytes(*kinds[name])
    header = json.dumps(rows).encode()
    header += b" " * (-len(header) % 64 + 56)  # with the length in front: a multiple of 64
    start = 8 + len(header)
    whole = len(header).to_bytes(8, "little") + header
    return whole, {name: start + offset for name, offset in offsets.items()}, start + at
