"""Key/value caches between the calls of one generation."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moec.spec.model import ModelSpec
from moec.weights.view import TORCH_DTYPES


@dataclass(slots=True)
class Cache:
    """`lengths` int64 [B]: tokens each row has seen; `tensors`: the graph's `past.*` inputs."""

    lengths: Tensor
    tensors: dict[str, Tensor]
    capacity: int


def slots(chunk: int | None, capacity: int) -> int:
    """Cache slots of a layer for `capacity` positions: a ring needs no more than its chunk."""
    return capacity if chunk is None else min(chunk, capacity)


def new_cache(spec: ModelSpec, precision: str, batch: int, capacity: int) -> Cache:
    """An empty cache with room for `capacity` positions a row; 0 keeps nothing."""
    dtype, width = TORCH_DTYPES[precision], spec.text.kv_width
    tensors = {
        f"past.{layer.index}.{kind}": torch.zeros(
            batch, slots(layer.chunk, capacity), width, dtype=dtype
        )
        for layer in spec.text.all_layers
        for kind in ("key", "value")
    }
    return Cache(torch.zeros(batch, dtype=torch.int64), tensors, capacity)


def grow(spec: ModelSpec, cache: Cache, capacity: int) -> None:
    """Make room for `capacity` positions. Each keeps its slot: a ring that wraps is full size."""
    for layer in spec.text.all_layers:
        more = slots(layer.chunk, capacity) - slots(layer.chunk, cache.capacity)
        for kind in ("key", "value"):
            name = f"past.{layer.index}.{kind}"
            cache.tensors[name] = functional.pad(cache.tensors[name], (0, 0, 0, more))
    cache.capacity = capacity
