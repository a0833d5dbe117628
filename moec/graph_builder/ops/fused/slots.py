"""Caches of slots, into which a call of one token of each sequence writes before it attends.

The caches are those of `moec.graph_builder.ops.cache`. The slot that a token takes over held a
position that no token sees any more: one of the chunk before, or one that has left the window. A
call also writes into the slot of a sequence that gets no token. The caller leaves such a sequence a
slot to spare. No token sees what is written there, and the sequence's next token overwrites it.
"""

import torch
from torch import Tensor

from moec.graph_builder.ops.cache import cache_append, held
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType


def _slot_rule(cache: TensorType, past: TensorType) -> TensorType:
    shown = "[B, slots, width]"
    need(len(cache.shape) == 3, "cache_slot", "cache", cache.shape, shown)
    need(past.shape == cache.shape[:1], "cache_slot", "past", past.shape, cache.shape[:1])
    return TensorType(past.shape, torch.int64)


@op("cache_slot(Tensor cache, Tensor past) -> Tensor", _slot_rule)
def cache_slot(cache: Tensor, past: Tensor) -> Tensor:
    """The slot of each sequence's next token, [B]."""
    return past % cache.shape[1]


def _positions_rule(cache: TensorType, past: TensorType) -> TensorType:
    return TensorType((*_slot_rule(cache, past).shape, cache.shape[1]), torch.int64)


@op("slot_positions(Tensor cache, Tensor past) -> Tensor", _positions_rule)
def slot_positions(cache: Tensor, past: Tensor) -> Tensor:
    """The position in each slot once the next token has its own, [B, N]; -1 where empty."""
    return held(past[:, None], cache.shape[1]).clamp(min=-1)


def _put_rule(cache: TensorType, x: TensorType, slot: TensorType) -> TensorType:
    cache_append.rule(cache, x)
    need(slot.shape == cache.shape[:1], "cache_put", "slot", slot.shape, cache.shape[:1])
    return cache


@op("cache_put(Tensor(a!) cache, Tensor x, Tensor slot) -> Tensor(a!)", _put_rule)
def cache_put(cache: Tensor, x: Tensor, slot: Tensor) -> Tensor:
    """Write x [B, 1, W] into the slot [B] of each sequence in cache [B, N, W]; return the cache."""
    return cache.scatter_(1, slot[:, None, None].expand(-1, 1, x.shape[2]), x)
