"""Attention over buffers of keys and values: a call writes its tokens into them, then attends.

The S tokens of a sequence go to slots `last - S + 1` to `last`. Each token sees the slots up to its
own. A global layer has a slot for each position. A chunked layer needs only `chunk` slots: position
p is in slot p mod chunk. A token sees its own chunk only, which is in slots 0 to p mod chunk. So
causal attention over these slots is chunked attention, as long as no sequence crosses a chunk
border within a call; the caller splits its calls there. With a mask, the buffer of a chunked layer
may hold every position, and calls may have any length.
"""

import torch
from torch import Tensor

from moec.graph_builder.ops.attention import attention
from moec.graph_builder.ops.operands import BufferedAttention
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType


def _rule(of: BufferedAttention[TensorType]) -> tuple[TensorType, TensorType, TensorType]:
    name, heads, kv_heads = "buffered_attention", of.heads, of.kv_heads
    q, k, v, key, value = of.q, of.k, of.v, of.key, of.value
    need(heads % kv_heads == 0, name, "heads", heads, f"a multiple of {kv_heads}")
    need(q.shape[2] % heads == 0, name, "q", q.shape, f"width in {heads} heads")
    size = q.shape[2] // heads
    need(k.shape[2] == size * kv_heads and v == k, name, "k, v", (k, v), f"width {size * kv_heads}")
    fits = len(key.shape) == 4 and (key.shape[1], key.shape[3]) == (kv_heads, size)
    expected = f"[B, {kv_heads}, slots, {size}]"
    need(fits and value == key, name, "key, value", (key, value), expected)
    need(q.dtype == k.dtype == key.dtype, name, "dtypes", (q, k, key), "one dtype")
    ends = TensorType(q.shape[:1], torch.int32)
    need(of.last == ends, name, "last", of.last, f"int32 {q.shape[:1]}")
    need(of.total == TensorType((), torch.int32), name, "total", of.total, "an int32 scalar")
    fits = of.mask is None or of.chunk is None
    need(fits, name, "chunk", of.chunk, "a mask or a chunk, not both")
    if of.mask is not None:
        shape = of.mask.shape
        need(shape[:3] == (q.shape[0], 1, q.shape[1]), name, "mask", shape, "[B,1,S,K]")
    return q, key, value


@op(
    "buffered_attention(Tensor q, Tensor k, Tensor v, Tensor key, Tensor value, Tensor last, "
    "Tensor total, Tensor? mask, int? chunk, int heads, int kv_heads) -> (Tensor, Tensor, Tensor)",
    _rule,
    BufferedAttention,
)
def buffered_attention(of: BufferedAttention[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Append a call's tokens, then attend: out [B, S, heads * d], and both buffers.

    Raises:
        MoecError: the tokens of a sequence do not fit its buffer, or cross the end of its chunk.
    """
    q, last = of.q, of.last
    steps, slots, count = q.shape[1], of.key.shape[2], int(of.total)
    name = "buffered_attention"
    room = slots if of.chunk is None else min(slots, of.chunk)
    need(count > int(last.max()), name, "total", count, f"more than {int(last.max())}")
    need(count <= room, name, "last", f"tokens to slot {count - 1}", f"{room} slots")
    at = last.long()[:, None] + torch.arange(1 - steps, 1, device=q.device)  # [B, S]
    rows = torch.arange(len(q), device=q.device)[:, None]
    key, value = of.key.clone(), of.value.clone()
    for buffer, new in ((key, of.k), (value, of.v)):
        buffer[rows, :, at] = new.unflatten(2, (of.kv_heads, -1))  # [B, S, kv_heads, d]
    seen = torch.arange(count, device=q.device) <= at[..., None]  # [B, S, count]
    seen = seen[:, None] if of.mask is None else seen[:, None] & of.mask[..., :count]
    flat = [buffer[:, :, :count].transpose(1, 2).flatten(2) for buffer in (key, value)]
    return attention.eager(q, *flat, seen, of.heads, of.kv_heads, None), key, value


def _slot_rule(ids: TensorType, last: TensorType, buffer: TensorType) -> TensorType:
    need(last.shape == ids.shape[:1], "slot_mask", "last", last, f"int32 {ids.shape[:1]}")
    need(len(buffer.shape) == 4, "slot_mask", "buffer", buffer, "[B, kv_heads, slots, d]")
    return TensorType((ids.shape[0], 1, ids.shape[1], buffer.shape[2]), torch.bool)


@op("slot_mask(Tensor ids, Tensor last, Tensor buffer) -> Tensor", _slot_rule)
def slot_mask(ids: Tensor, last: Tensor, buffer: Tensor) -> Tensor:
    """The slots of `buffer` that each token of ids [B, S] sees, bool [B, 1, S, N]: up to its own.

    `last` [B] is the slot of each sequence's last token. `buffered_attention` limits tokens in the
    same way if it has no mask.
    """
    at = last.long()[:, None] + torch.arange(1 - ids.shape[1], 1, device=ids.device)  # [B, S]
    return (torch.arange(buffer.shape[2], device=ids.device) <= at[..., None])[:, None]


def _mask_rule(mask: TensorType, ids: TensorType) -> tuple[TensorType, TensorType, TensorType]:
    rows = ids.shape[:1]
    need(mask.shape[:1] == rows, "spans_of_mask", "mask", mask.shape, f"[{rows[0]}, K]")
    scalar = TensorType((), torch.int32)
    return TensorType(rows, torch.int64), TensorType(rows, torch.int32), scalar


@op("spans_of_mask(Tensor mask, Tensor ids) -> (Tensor, Tensor, Tensor)", _mask_rule)
def spans_of_mask(mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mask [B, K] says which tokens so far are no padding; ids [B, S] are the last S of them.

    Returns the number of earlier tokens [B], the slot of the last token [B], and K. Padding on the
    right occupies slots too, until later tokens overwrite it.
    """
    past = mask[:, : mask.shape[1] - ids.shape[1]].sum(1)
    return past, (past + ids.shape[1] - 1).int(), torch.tensor(mask.shape[1], dtype=torch.int32)


@op(
    "columns(Tensor x) -> Tensor",
    lambda x: TensorType(x.shape, torch.int64),
)
def columns(x: Tensor) -> Tensor:
    """x [B, S] -> 0, 1, ..., S - 1 in each row, int64 [B, S]."""
    return torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
