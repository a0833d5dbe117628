"""Write a checkpoint of full size that takes no room on the disk: real headers and sparse shards.

`export` reads headers and FP8 scales only. So for it this is a checkpoint of 217 or 803 GB. All
weights are zero, and so are scales, except those of FP8 in blocks: a build refuses zeros there.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moec.spec.hf.config import write_config
from moec.spec.model import ModelSpec
from moec.spec.tensors import Kind, in_words
from moec.weights.checkpoint import INDEX
from moec.weights.name_map import CheckpointTensor, checkpoint_tensors
from moec.weights.shard import DTYPES

_PROBE = 1 << 26  # bytes
#: how the keys of float32 scales of blocks end, and a scale
BLOCK_SCALE, _ONE = ".weight_scale_inv", struct.pack("<f", 1.0)
#: names and bytes of an element in safetensors, by our names of types
TYPES = {ours: (theirs, size) for theirs, (ours, size) in DTYPES.items()}


def write_sparse_checkpoint(spec: ModelSpec, folder: Path, shard_bytes: int = 50 * 10**9) -> int:
    """Write config, index and sparse shards of `spec` to `folder`; return the bytes of its tensors.

    A shard holds up to `shard_bytes`, or one larger tensor.

    Raises:
        OSError: the file system of `folder` does not support sparse files, or files of this size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_sparse_files(folder)
    shards = list(_shards(stored(spec), shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += _write_shard(folder / name, shard)
        weight_map |= {row.key: name for row in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    config = json.dumps(write_config(spec), indent=2)
    (folder / "config.json").write_text(config, encoding="utf-8")
    return total


def bytes_on_disk(folder: Path) -> int:
    """The bytes that the files below `folder` take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def stored(spec: ModelSpec) -> Iterator[CheckpointTensor]:
    """The tensors of `spec` as a checkpoint stores them."""
    for row in checkpoint_tensors(spec):
        if row.dtype != "uint8":
            yield row
            continue
        words = in_words(Kind(row.shape, row.dtype))
        yield replace(row, shape=words.shape, dtype=words.dtype)
        if row.key.endswith("_packed"):
            key = row.key.removesuffix("_packed") + "_shape"
            yield CheckpointTensor(key, key, (2,), "int64")


def _shards(table: Iterator[CheckpointTensor], limit: int) -> Iterator[list[CheckpointTensor]]:
    shard: list[CheckpointTensor] = []
    size = 0
    for row in table:
        nbytes = math.prod(row.shape) * TYPES[row.dtype][1]
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(row)
        size += nbytes
    yield shard


def _write_shard(path: Path, shard: list[CheckpointTensor]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for row in shard:
        dtype, itemsize = TYPES[row.dtype]
        start, end = end, end + math.prod(row.shape) * itemsize
        header[row.key] = {"dtype": dtype, "shape": row.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for row in shard:
            if row.key.endswith(BLOCK_SCALE):
                begin, stop = header[row.key]["data_offsets"]
                file.seek(8 + len(text) + begin)
                file.write(_ONE * ((stop - begin) // len(_ONE)))
    return end


def _check_sparse_files(folder: Path) -> None:
    """Try a small sparse file first; without support for it, zeros would fill the disk."""
    probe = folder / "probe"
    try:
        with probe.open("wb") as file:
            file.truncate(_PROBE)
        taken = probe.stat().st_blocks * 512
    finally:
        probe.unlink(missing_ok=True)
    if taken >= _PROBE:
        raise OSError(f"{folder}: this file system has no sparse files; set TMPDIR to another one")
