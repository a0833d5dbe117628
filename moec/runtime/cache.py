"""Key/value caches between the calls of one generation."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moec.runtime.engines.engine import Layout
from moec.runtime.engines.gpu import memory_for
from moec.spec import names
from moec.spec.model import ModelSpec
from moec.weights.view import STORED, TORCH_DTYPES


@dataclass(slots=True)
class Cache:
    """`lengths` int64 [B]: tokens each row has seen; `tensors`: the graph's `past.*` inputs."""

    lengths: Tensor
    tensors: dict[str, Tensor]
    capacity: int

    def of(self, rows: slice) -> dict[str, Tensor]:
        """The tensors of some rows, without a copy."""
        if rows == slice(None):
            return self.tensors
        return {name: tensor[rows] for name, tensor in self.tensors.items()}


def slots(chunk: int | None, capacity: int) -> int:
    """Cache slots of a layer for `capacity` positions: a ring needs no more than its chunk."""
    return capacity if chunk is None else min(chunk, capacity)


def new_cache(
    spec: ModelSpec,
    precision: str,
    batch: int,
    capacity: int,
    layout: Layout = "slots",
    device: str = "cpu",
) -> Cache:
    """An empty cache with room for `capacity` positions a row; 0 keeps nothing.

    Raises:
        MoecError: more than the GPU has room for (exit code 3).
    """
    text, narrow = spec.text, spec.scheme is not None and spec.scheme.cache
    dtype = STORED["fp8"] if narrow else TORCH_DTYPES[precision]

    def shape(chunk: int | None) -> tuple[int, ...]:
        count = slots(chunk, capacity)
        if layout == "slots":
            return batch, count, text.kv_width
        return batch, text.kv_heads, count, text.head_dim

    with memory_for(f"caches of {batch} x {capacity} positions"):
        tensors = {
            names.past(layer.index, kind): torch.zeros(
                shape(layer.chunk), dtype=dtype, device=device
            )
            for layer in text.all_layers
            for kind in names.CACHED
        }
    return Cache(torch.zeros(batch, dtype=torch.int64), tensors, capacity)


def grow(spec: ModelSpec, cache: Cache, capacity: int) -> None:
    """Make room for `capacity` positions. Each keeps its slot: a ring that wraps is full size.

    Raises:
        MoecError: more than the GPU has room for (exit code 3). What has grown by then stays so.
    """
    with memory_for(f"caches of {len(cache.lengths)} x {capacity} positions"):
        for layer in spec.text.all_layers:
            wanted = slots(layer.chunk, capacity)
            for kind in names.CACHED:
                name = names.past(layer.index, kind)
                tensor = cache.tensors[name]
                more = wanted - tensor.shape[-2]  # a call before may have failed half-way
                if more > 0:
                    cache.tensors[name] = functional.pad(tensor, (0, 0, 0, more))
    cache.capacity = capacity


def spans(chunk: int | None, past: Tensor, count: int) -> dict[str, Tensor]:
    """Where buffers take `count` more tokens of rows that have `past` [B]: a graph's inputs.

    `ring.*` are those of chunked layers, `global.*` of the others: the slot of each row's last
    token, int32 [B], and how many slots are in use at most, an int32 scalar.
    """
    last = {names.GLOBAL: past + count - 1, names.RING: past % (chunk or 1) + count - 1}
    ends = {names.last(kind): slot.int() for kind, slot in last.items()}
    return ends | {names.total(kind): (slot.max() + 1).int() for kind, slot in last.items()}
