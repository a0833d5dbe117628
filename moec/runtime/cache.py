"""Key/value caches, which keep the keys and values of sequences from call to call."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moec.runtime.engines.engine import Layout
from moec.runtime.engines.gpu import memory_for
from moec.runtime.memory import available, cache_bytes, most_tokens, slots
from moec.spec import names
from moec.spec.errors import clear_errors, refuse
from moec.spec.model import ModelSpec, TextSpec
from moec.spec.parts.attention import CacheSpec
from moec.weights.view import STORED, TORCH_DTYPES

#: new tokens after a prompt for which a cache has room from the start
AHEAD = 8192


@dataclass(slots=True)
class Cache:
    """The keys and values of B sequences.

    Attributes:
        lengths: int64 [B], the number of tokens that each sequence has so far.
        tensors: the graph's inputs `past.*`, by name.
        capacity: the number of tokens of a sequence for which there is room.
        most: the number of tokens for which room was asked.
        reached: of one sequence, the most tokens that it had when some were taken back.
    """

    lengths: Tensor
    tensors: dict[str, Tensor]
    capacity: int
    most: int = 0
    reached: int = 0

    def of(self, rows: slice) -> dict[str, Tensor]:
        """The tensors of some sequences, without a copy."""
        if rows == slice(None):
            return self.tensors
        return {name: tensor[rows] for name, tensor in self.tensors.items()}


@clear_errors
def new_cache(
    spec: ModelSpec,
    precision: str,
    batch: int,
    capacity: int,
    layout: Layout = "slots",
    device: str = "cpu",
    prompt: int | None = None,
) -> Cache:
    """An empty cache for `capacity` tokens of each of `batch` sequences.

    Memory must have room for all of them. With `prompt`, the tokens of a prompt, room for many new
    tokens is made only when they come, because sequences may end early.

    A cache of capacity 0 keeps nothing. `precision` is the dtype that the graph computes in.

    Raises:
        MoecError: there is too little memory (exit code 2), or the GPU's is too small (3).
    """
    dtype = cache_dtype(spec, precision)
    _check_room(spec, dtype.itemsize, batch, capacity, layout, device, prompt)
    most = capacity
    if prompt is not None:
        capacity = min(capacity, prompt + AHEAD)
    with memory_for(f"caches of {batch} x {capacity} positions"):
        tensors = {
            names.past(layer.index, each.kind): torch.zeros(
                layer_shape(each, batch, capacity, layout), dtype=dtype, device=device
            )
            for layer in spec.text.all_layers
            for each in layer.caches
        }
    return Cache(torch.zeros(batch, dtype=torch.int64), tensors, capacity, most)


def layer_shape(each: CacheSpec, batch: int, capacity: int, layout: Layout) -> tuple[int, ...]:
    """The shape of one tensor of a cache for `capacity` tokens of each of `batch` sequences."""
    count = slots(each.kept, capacity)
    if layout == "slots":
        return batch, count, each.width
    return batch, each.heads, count, each.size


def cache_dtype(spec: ModelSpec, precision: str) -> torch.dtype:
    """The type of keys and values in caches, for a graph that computes in `precision`."""
    narrow = spec.scheme is not None and spec.scheme.cache
    return STORED["fp8"] if narrow else TORCH_DTYPES[precision]


def _check_room(
    spec: ModelSpec,
    element: int,
    batch: int,
    capacity: int,
    layout: Layout,
    device: str,
    prompt: int | None = None,
) -> None:
    """Refuse caches for which memory has no room; see `new_cache` for the arguments.

    `element` is the bytes of one number; `prompt` is the length of a prompt, if the caller asked
    for new tokens after it; the message then speaks of these.

    Raises:
        MoecError: the message says how many tokens have room, and how many the model is made for.
    """
    wanted, free = cache_bytes(spec, element, batch, capacity, layout), available(device)
    if wanted <= free:
        return
    most = most_tokens(spec, element, batch, layout, free, capacity)
    if prompt is None:
        where, fits = f"{capacity:,} positions", f"{most:,} positions"
    else:
        where = f"max_new_tokens {capacity - prompt + 1:,}"
        fits = f"at most {max(0, most - prompt + 1):,} new tokens after a prompt of {prompt:,}"
    refuse(
        where,
        f"caches of {batch} x {capacity:,} positions need {wanted / 2**30:,.1f} GiB, and "
        f"{free / 2**30:,.1f} GiB are free on {device}",
        f"{fits}; {spec.name} is made for {spec.text.max_positions:,} positions in all",
        "ask for fewer tokens: --max-new-tokens, or fewer sequences at once",
        exit_code=2 if device == "cpu" else 3,
    )


def room_for(cache: Cache, lengths: Tensor, width: int, layout: Layout) -> int:
    """The tokens for which a cache must have room, to append `lengths` [B] of ids [B, width].

    In a layout of slots, calls may write for a sequence that gets no token, into a slot to spare.
    """
    new = (lengths + 1).clamp(max=width) if layout == "slots" else lengths.clamp(min=1)
    return int((cache.lengths + new).max())


@clear_errors
def grow(spec: ModelSpec, cache: Cache, needed: int, layout: Layout = "slots") -> None:
    """Make room for `needed` tokens of each sequence, and for more that may follow.

    Tokens keep their slots: a ring reuses slots only when it has its full size, and then it does
    not grow.

    Raises:
        MoecError: there is too little memory (exit code 2), or the GPU's is too small (3). The
            layers that have grown by then stay larger.
    """
    batch, first = len(cache.lengths), next(iter(cache.tensors.values()))
    twice = 2 * cache.capacity
    capacity = max(needed, min(twice, cache.most) if needed <= cache.most else twice)
    room = available(first.device.type)
    if cache_bytes(spec, first.itemsize, batch, capacity, layout) > room:
        capacity = needed
    _check_room(spec, first.itemsize, batch, capacity, layout, first.device.type)
    with memory_for(f"caches of {len(cache.lengths)} x {capacity} positions"):
        for layer in spec.text.all_layers:
            for each in layer.caches:
                wanted = slots(each.kept, capacity)
                name = names.past(layer.index, each.kind)
                tensor = cache.tensors[name]
                more = wanted - tensor.shape[-2]  # an earlier call may have failed half-way
                if more > 0:
                    cache.tensors[name] = functional.pad(tensor, (0, 0, 0, more))
    cache.capacity = capacity


def reserve(spec: ModelSpec, cache: Cache, capacity: int, prompt: int, layout: Layout) -> None:
    """Make sure of room for `capacity` tokens in a cache of one sequence that may have less.

    Room beyond a prompt of `prompt` tokens is made as `new_cache` does. It grows to twice its size
    where that has room, so that few turns of a conversation move the cache.

    Raises:
        MoecError: as `new_cache`; the cache still holds what it held.
    """
    first = next(iter(cache.tensors.values()))
    if capacity > cache.capacity:
        _check_room(spec, first.itemsize, 1, capacity, layout, first.device.type, prompt)
    needed = min(capacity, prompt + AHEAD)
    if needed > cache.capacity:
        grow(spec, cache, needed, layout)


def take_back(cache: Cache, count: int, text: TextSpec) -> int:
    """Let a cache of one sequence forget what comes after its first `count` tokens.

    Returns how many tokens it keeps. The rings of chunked layers keep no position of an attention
    chunk once the next chunk reuses its slot. The cache then keeps the tokens before that chunk:
    no later token sees the chunk in rings, and global layers keep all positions. The rings of
    sliding windows keep no position that has left the window: the cache then keeps nothing.
    """
    chunk, window = text.chunk, text.window
    cache.reached = max(cache.reached, int(cache.lengths))
    if chunk is not None and cache.reached > count - count % chunk + chunk:
        count -= count % chunk
    if window is not None and cache.reached > max(window, count + 1):
        count = 0  # the next token sees a position that a later one has replaced
    if count == 0:
        cache.reached = 0
    cache.lengths = cache.lengths.new_tensor([count])
    return count


def spans(chunk: int | None, past: Tensor, count: int) -> dict[str, Tensor]:
    """The graph inputs that say which slots of buffers a call uses.

    The call appends `count` tokens to sequences that have `past` [B] tokens. For chunked layers
    ("ring") and the others ("global") there are two inputs: "last", int32 [B], is the slot of each
    sequence's last token; "total", an int32 scalar, is the most slots that a sequence uses.
    """
    last = {names.GLOBAL: past + count - 1, names.RING: past % (chunk or 1) + count - 1}
    ends = {names.last(kind): slot.int() for kind, slot in last.items()}
    return ends | {names.total(kind): (slot.max() + 1).int() for kind, slot in last.items()}
