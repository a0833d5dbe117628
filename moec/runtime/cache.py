"""Key/value caches, which keep the keys and values of sequences from call to call."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moec.runtime.engines.engine import Layout
from moec.runtime.engines.gpu import memory_for
from moec.spec import names
from moec.spec.errors import clear_errors
from moec.spec.model import ModelSpec
from moec.weights.view import STORED, TORCH_DTYPES


@dataclass(slots=True)
class Cache:
    """The keys and values of B sequences.

    Attributes:
        lengths: int64 [B], the number of tokens that each sequence has so far.
        tensors: the graph's inputs `past.*`, by name.
        capacity: the number of tokens of a sequence for which there is room.
    """

    lengths: Tensor
    tensors: dict[str, Tensor]
    capacity: int

    def of(self, rows: slice) -> dict[str, Tensor]:
        """The tensors of some sequences, without a copy."""
        if rows == slice(None):
            return self.tensors
        return {name: tensor[rows] for name, tensor in self.tensors.items()}


def slots(chunk: int | None, capacity: int) -> int:
    """A layer's cache slots for `capacity` tokens; a chunked layer needs at most `chunk`."""
    return capacity if chunk is None else min(chunk, capacity)


@clear_errors
def new_cache(
    spec: ModelSpec,
    precision: str,
    batch: int,
    capacity: int,
    layout: Layout = "slots",
    device: str = "cpu",
) -> Cache:
    """An empty cache with room for `capacity` tokens of each of `batch` sequences.

    A cache of capacity 0 keeps nothing. `precision` is the dtype that the graph computes in.

    Raises:
        MoecError: there is too little memory (exit code 3).
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


@clear_errors
def grow(spec: ModelSpec, cache: Cache, capacity: int) -> None:
    """Make room for `capacity` tokens of each sequence.

    Tokens keep their slots: a ring reuses slots only when it has its full size, and then it does
    not grow.

    Raises:
        MoecError: there is too little memory (exit code 3). The layers that have grown by then
            stay larger.
    """
    with memory_for(f"caches of {len(cache.lengths)} x {capacity} positions"):
        for layer in spec.text.all_layers:
            wanted = slots(layer.chunk, capacity)
            for kind in names.CACHED:
                name = names.past(layer.index, kind)
                tensor = cache.tensors[name]
                more = wanted - tensor.shape[-2]  # an earlier call may have failed half-way
                if more > 0:
                    cache.tensors[name] = functional.pad(tensor, (0, 0, 0, more))
    cache.capacity = capacity


def spans(chunk: int | None, past: Tensor, count: int) -> dict[str, Tensor]:
    """The graph inputs that say which slots of buffers a call uses.

    The call appends `count` tokens to sequences that have `past` [B] tokens. For chunked layers
    ("ring") and the others ("global") there are two inputs: "last", int32 [B], is the slot of each
    sequence's last token; "total", an int32 scalar, is the most slots that a sequence uses.
    """
    last = {names.GLOBAL: past + count - 1, names.RING: past % (chunk or 1) + count - 1}
    ends = {names.last(kind): slot.int() for kind, slot in last.items()}
    return ends | {names.total(kind): (slot.max() + 1).int() for kind, slot in last.items()}
