"""Attention over key/value buffers that stay in place: each call writes its tokens, then attends.

`past` [B] counts the tokens a row has seen; position p lives in slot p. A chunked layer keeps a ring
of `chunk` slots, where p lives in slot p mod chunk: as nobody sees past a chunk border, the tokens
of the current chunk are slots 0 to p mod chunk, and plain causal attention over them is chunked
attention. So a call must not cross a border of any row's; whoever calls sees to that. With a mask
instead of a ring the buffer holds every position, and a call may be as long as it likes.
"""

import torch
from torch import Tensor

from moec.graph_builder.ops.attention import attention
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType


def _rule(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    key: TensorType,
    value: TensorType,
    past: TensorType,
    mask: TensorType | None,
    ring: int | None,
    heads: int,
    kv_heads: int,
) -> tuple[TensorType, TensorType, TensorType]:
    name = "buffered_attention"
    need(heads % kv_heads == 0, name, "heads", heads, f"a multiple of {kv_heads}")
    need(q.shape[2] % heads == 0, name, "q", q.shape, f"width in {heads} heads")
    size = q.shape[2] // heads
    need(k.shape[2] == size * kv_heads and v == k, name, "k, v", (k, v), f"width {size * kv_heads}")
    fits = len(key.shape) == 4 and (key.shape[1], key.shape[3]) == (kv_heads, size)
    expected = f"[B, {kv_heads}, slots, {size}]"
    need(fits and value == key, name, "key, value", (key, value), expected)
    need(q.dtype == k.dtype == key.dtype, name, "dtypes", (q, k, key), "one dtype")
    need(past.shape == q.shape[:1], name, "past", past.shape, q.shape[:1])
    need(mask is None or ring is None, name, "ring", ring, "a mask or a ring, not both")
    if mask is not None:
        need(mask.shape[:3] == (q.shape[0], 1, q.shape[1]), name, "mask", mask.shape, "[B,1,S,K]")
    return q, key, value


@op(
    "buffered_attention(Tensor q, Tensor k, Tensor v, Tensor key, Tensor value, Tensor past, "
    "Tensor? mask, int? ring, int heads, int kv_heads) -> (Tensor, Tensor, Tensor)",
    _rule,
)
def buffered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    value: Tensor,
    past: Tensor,
    mask: Tensor | None,
    ring: int | None,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, heads*d], k, v [B, S, kv_heads*d], buffers [B, kv_heads, N, d] -> out and buffers.

    The S tokens of each row go to slots past to past + S - 1, all modulo the ring, and every query
    sees the slots up to its own; `mask` [B, 1, S, K] further limits it to some of the first K.

    Raises:
        MoecError: the tokens of a row do not fit its buffer or cross the end of its ring.
    """
    steps, slots = q.shape[1], key.shape[2]
    first = past if ring is None else past % ring  # [B]
    last = int(first.max()) + steps
    room = slots if ring is None else min(slots, ring)
    need(last <= room, "buffered_attention", "past", f"tokens to slot {last}", f"{room} slots")
    at = first[:, None] + torch.arange(steps, device=q.device)  # [B, S]
    rows = torch.arange(len(q), device=q.device)[:, None]
    key, value = key.clone(), value.clone()
    for buffer, new in ((key, k), (value, v)):
        buffer[rows, :, at] = new.unflatten(2, (kv_heads, -1))  # [B, S, kv_heads, d]
    seen = torch.arange(last, device=q.device) <= at[..., None]  # [B, S, last]
    seen = seen[:, None] if mask is None else seen[:, None] & mask[..., :last]
    flat = [buffer[:, :, :last].transpose(1, 2).flatten(2) for buffer in (key, value)]
    return attention.eager(q, *flat, seen, heads, kv_heads), key, value


def _mask_lengths_rule(mask: TensorType, ids: TensorType) -> TensorType:
    need(mask.shape[0] == ids.shape[0], "past_of_mask", "mask", mask.shape, f"[{ids.shape[0]}, K]")
    return TensorType(ids.shape[:1], torch.int64)


@op("past_of_mask(Tensor mask, Tensor ids) -> Tensor", _mask_lengths_rule)
def past_of_mask(mask: Tensor, ids: Tensor) -> Tensor:
    """Padding mask [B, K] of all tokens so far, the S of ids [B, S] last -> tokens before [B]."""
    return mask[:, : mask.shape[1] - ids.shape[1]].sum(1)


@op(
    "columns(Tensor x) -> Tensor",
    lambda x: TensorType(x.shape, torch.int64),
)
def columns(x: Tensor) -> Tensor:
    """x [B, S] -> 0, 1, ..., S - 1 in each row, int64 [B, S]."""
    return torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
