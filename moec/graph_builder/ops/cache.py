"""Key/value caches of N slots: position p lives in slot p mod N.

A chunked layer needs N = chunk slots, because a token sees its own chunk only. A global layer needs
a slot for each position, and p mod N is p. So the same ops serve both kinds of layers, for any
position and for sequences of different lengths. N may be 0; then nothing is kept.

`past` [B] is the number of tokens that are in the cache. `new` [B] says how many of this call's S
tokens belong to each sequence. The rest is padding on the right: causal masks hide it, and
`cache_index` does not write it.
"""

import torch
from torch import Tensor

from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType, plus


def _cache_is_3d(name: str, cache: TensorType) -> None:
    need(len(cache.shape) == 3, name, "cache", cache.shape, "[B, slots, kv_heads * head_dim]")


def _key_positions_rule(cache: TensorType, past: TensorType, positions: TensorType) -> TensorType:
    _cache_is_3d("key_positions", cache)
    need(past.shape == cache.shape[:1], "key_positions", "past", past.shape, cache.shape[:1])
    return TensorType((cache.shape[0], plus(cache.shape[1], positions.shape[1])), torch.int64)


def held(last: Tensor, slots: int) -> Tensor:
    """The position in each slot once a row's newest is `last` [B, 1]: [B, slots], < 0 if none."""
    slot = torch.arange(slots, device=last.device)[None]
    return last - (last - slot) % max(slots, 1)


@op("key_positions(Tensor cache, Tensor past, Tensor positions) -> Tensor", _key_positions_rule)
def key_positions(cache: Tensor, past: Tensor, positions: Tensor) -> Tensor:
    """Positions of all keys, [B, N + S]: first the slots (-1 where empty), then the new tokens."""
    return torch.cat([held(past[:, None] - 1, cache.shape[1]).clamp(min=-1), positions], 1)


def _index_rule(cache: TensorType, past: TensorType, new: TensorType) -> TensorType:
    _cache_is_3d("cache_index", cache)
    for name, operand in (("past", past), ("new", new)):
        need(operand.shape == cache.shape[:1], "cache_index", name, operand.shape, cache.shape[:1])
    return TensorType(cache.shape[:2], torch.int64)


@op("cache_index(Tensor cache, Tensor past, Tensor new) -> Tensor", _index_rule)
def cache_index(cache: Tensor, past: Tensor, new: Tensor) -> Tensor:
    """What each slot holds after this call, as an index [B, N] into (old slots, new tokens)."""
    slots = cache.shape[1]
    token = held((past + new)[:, None] - 1, slots) - past[:, None]  # < 0: written before this call
    return torch.where(token >= 0, slots + token, torch.arange(slots, device=past.device)[None])


def _append_rule(cache: TensorType, new: TensorType) -> TensorType:
    _cache_is_3d("cache_append", cache)
    alike = new.shape[::2] == cache.shape[::2] and new.dtype == cache.dtype
    need(alike, "cache_append", "new", new, f"batch, width and dtype of {cache}")
    return cache.like(cache.shape[0], plus(cache.shape[1], new.shape[1]), cache.shape[2])


@op("cache_append(Tensor cache, Tensor new) -> Tensor", _append_rule)
def cache_append(cache: Tensor, new: Tensor) -> Tensor:
    """cache [B, N, W], new [B, S, W] -> [B, N + S, W]: all that this call's queries can see."""
    return torch.cat([cache, new], 1)


def _write_rule(seen: TensorType, index: TensorType) -> TensorType:
    need(index.shape[0] == seen.shape[0], "cache_write", "index", index.shape, "[B, N]")
    return seen.like(*index.shape, seen.shape[2])


@op("cache_write(Tensor seen, Tensor index) -> Tensor", _write_rule)
def cache_write(seen: Tensor, index: Tensor) -> Tensor:
    """seen [B, N + S, W], index [B, N] -> the cache after this call, [B, N, W]."""
    rows = torch.arange(len(seen), device=seen.device)[:, None]
    return seen[rows, index]
