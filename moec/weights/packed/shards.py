"""Write weights as the shards of a Hugging Face checkpoint, with their index."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.spec.hf.forms import INDEX, SINGLE
from moec.spec.names import input_scale_of
from moec.weights.packed.file import write_packed
from moec.weights.packed.journal import Hash, discard, finish
from moec.weights.packed.published import Published, in_shards, sizes_of
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry, read_shard


def write_shards(
    folder: Path,
    packings: Mapping[str, Packing],
    entries: Mapping[str, TensorEntry],
    places: Mapping[str, Published],
    progress: Callable[[int, int], None],
    hashes: dict[str, Hash] | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> tuple[list[str], int]:
    """Pack each parameter from `entries` into shards in `folder`. Several shards have an index.

    The tensors have the names in `places`. `constants` are static scales, one for each part of a
    parameter, by the parameter. `progress`, `hashes` and what happens to a call that was cut off
    are as in `write_packed`.

    Returns:
        The names of the shards, and the bytes of weights that this call packed.

    Raises:
        MoecError: as `write_packed`.
    """
    shards = list(in_shards(packings, entries))
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [SINGLE]
    sizes = [sum(entries[each.source].nbytes for each in shard.values()) for shard in shards]
    discard(folder, files)
    before, read = 0, 0
    for file, shard, size in zip(files, shards, sizes, strict=True):

        def step(done: int, _: int, before: int = before) -> None:
            progress(before + done, sum(sizes))

        own = _sizes(shard, entries, places)
        static = constants or {}
        for packing in shard.values():
            if packing.source in static:
                own[input_scale_of(packing.source)] = static[packing.source]
        path = folder / file
        read += write_packed(
            path, shard, entries, step, own, hashes, published=places, journal_stays=True
        )
        before += size
    for file in files:
        finish(folder / file)
    if len(files) > 1:
        found = {file: read_shard(folder / file).tensors for file in files}
        index = {key: file for file, tensors in found.items() for key in tensors}
        total = sum(each.nbytes for tensors in found.values() for each in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    return files, read


def _sizes(
    shard: Mapping[str, Packing],
    entries: Mapping[str, TensorEntry],
    places: Mapping[str, Published],
) -> dict[str, Tensor]:
    """What a shard says of the sizes of its 4-bit integers: rows and columns of each matrix."""
    found = {}
    for packing in shard.values():
        name = sizes_of(packing.source)
        if name in places:
            *experts, rows, columns = entries[packing.source].shape
            parts = len(places[name])
            # experts are [in, out], and their gate and up have half of the outputs each
            each = [columns * experts[0] // parts, rows] if experts else [rows, columns]
            found[name] = torch.tensor([each] * parts)
    return found


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a new file, in place of one that may be there."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
