"""Fused attention over buffers in place: positions and appending in one op, the rest in another.

The buffers are those of `buffers`: a call's S tokens go to slots `last - S + 1` to `last` of their
row, each query sees the slots up to its own, and no call crosses the end of a chunk.
"""

import torch
from torch import Tensor

from moec.graph_builder.ops.attention import attention, head_norm, scale_queries
from moec.graph_builder.ops.fused.layers import encode, encoded
from moec.graph_builder.ops.operands import Attend, FusedAttention, RopeAppend
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.ops.rope import rope
from moec.graph_builder.types import Dim, TensorType, times

Placed = RopeAppend[TensorType] | Attend[TensorType] | FusedAttention[TensorType]


def _need_buffers(name: str, of: Placed, batch: object, size: object) -> None:
    """Check key, value [B, kv_heads, N, d] and last [B]."""
    key, expected = of.key, (batch, of.kv_heads, size)
    fits = len(key.shape) == 4 and (key.shape[0], key.shape[1], key.shape[3]) == expected
    shown = f"[B, {of.kv_heads}, N, {size}]"
    need(fits and of.value == key, name, "key, value", (key, of.value), shown)
    need(of.last == TensorType((batch,), torch.int32), name, "last", of.last, f"int32 [{batch}]")


def _need_tables(
    name: str,
    of: RopeAppend[TensorType] | FusedAttention[TensorType],
    batch: Dim,
    steps: Dim | None,
    size: Dim,
) -> None:
    """Check cos, sin [B, S, d/2] and temperature [B, S, 1]; without `steps`, any S will do."""
    cos, sin = of.cos, of.sin
    need((cos is None) == (sin is None), name, "cos, sin", (cos, sin), "both or neither")
    for label, table, width in (
        ("cos", cos, size // 2),
        ("sin", sin, size // 2),
        ("temperature", of.temperature, 1),
    ):
        if table is not None:
            count = table.shape[1] if steps is None else steps
            expected = TensorType((batch, count, width), torch.float32)
            need(table == expected, name, label, table, expected)


def _rope_rule(of: RopeAppend[TensorType]) -> TensorType:
    name, qkv, count = "rope_append", of.qkv, of.heads + 2 * of.kv_heads
    fits = len(qkv.shape) == 3 and qkv.shape[2] % count == 0
    need(fits, name, "qkv", qkv.shape, f"width in {count} heads")
    batch, steps, size = *qkv.shape[:2], qkv.shape[2] // count
    need(qkv.dtype == of.key.dtype, name, "dtypes", (qkv, of.key), "one dtype")
    _need_buffers(name, of, batch, size)
    _need_tables(name, of, batch, steps, size)
    return qkv.like(batch, steps, of.heads * size)


@op(
    "rope_append(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? temperature, Tensor(a!) key, "
    "Tensor(b!) value, Tensor last, int heads, int kv_heads, float? eps) -> Tensor",
    _rope_rule,
    RopeAppend,
)
def rope_append(of: RopeAppend[Tensor]) -> Tensor:
    """The queries of a call's tokens, [B, S, heads * d]; their keys and values are appended.

    Adjacent pairs of queries and keys are rotated by cos and sin, then heads are normalised with
    `eps`, each where given; queries are multiplied by temperature. Keys and values are written into
    their buffers, in place. Each step is rounded to qkv's dtype.

    Raises:
        MoecError: the tokens of a row do not fit its buffer.
    """
    steps, size, heads, kv_heads = of.qkv.shape[1], of.key.shape[3], of.heads, of.kv_heads
    q, k, v = of.qkv.split([heads * size, kv_heads * size, kv_heads * size], 2)
    if of.cos is not None:
        q, k = (
            rope.eager(x, of.cos, of.sin, count, "adjacent")
            for x, count in ((q, heads), (k, kv_heads))
        )
    if of.eps is not None:
        q, k = (head_norm.eager(x, None, n, of.eps) for x, n in ((q, heads), (k, kv_heads)))
    if of.temperature is not None:
        q = scale_queries.eager(q, of.temperature)
    at = _slots("rope_append", of.last, steps, of.key)
    rows = torch.arange(len(q), device=q.device)[:, None]
    for buffer, new in ((of.key, k), (of.value, v)):
        buffer[rows, :, at] = new.unflatten(2, (kv_heads, size))  # [B, S, kv_heads, d]
    return q.clone()  # a result of its own, no view of qkv


def _attend_rule(of: Attend[TensorType]) -> TensorType:
    name, q, heads = "attend", of.q, of.heads
    need(heads % of.kv_heads == 0, name, "heads", heads, f"a multiple of {of.kv_heads}")
    need(len(q.shape) == 3 and q.shape[2] % heads == 0, name, "q", q.shape, f"{heads} heads")
    need(q.dtype == of.key.dtype, name, "dtypes", (q, of.key), "one dtype")
    _need_buffers(name, of, q.shape[0], q.shape[2] // heads)
    need(of.total == TensorType((), torch.int32), name, "total", of.total, "an int32 scalar")
    return q


@op(
    "attend(Tensor q, Tensor key, Tensor value, Tensor last, Tensor total, int heads, "
    "int kv_heads) -> Tensor",
    _attend_rule,
    Attend,
)
def attend(of: Attend[Tensor]) -> Tensor:
    """Attention of q over the buffers, [B, S, heads * d]; `total` is on the CPU.

    Raises:
        MoecError: `total` is not above every slot of `last`, or above N.
    """
    q, key, last, count = of.q, of.key, of.last, int(of.total)
    at = _slots("attend", last, q.shape[1], key)
    expected = f"above {int(last.max())}, at most {key.shape[2]}"
    need(int(last.max()) < count <= key.shape[2], "attend", "total", count, expected)
    seen = torch.arange(count, device=q.device) <= at[..., None]  # [B, S, count]
    k, v = (buffer[:, :, :count].transpose(1, 2).flatten(2) for buffer in (key, of.value))
    return attention.eager(q, k, v, seen[:, None], of.heads, of.kv_heads, None)


def _attend_fp8_rule(of: Attend[TensorType]) -> tuple[TensorType, TensorType]:
    out = _attend_rule(of)
    return encoded(times(*out.shape[:2]), out.shape[2])


@op(
    "attend_fp8(Tensor q, Tensor key, Tensor value, Tensor last, Tensor total, int heads, "
    "int kv_heads) -> (Tensor, Tensor)",
    _attend_fp8_rule,
    Attend,
)
def attend_fp8(of: Attend[Tensor]) -> tuple[Tensor, Tensor]:
    """`attend`, rounded to q's dtype, packed: codes [B*S, heads*d] and scale [B*S]."""
    out = attend.eager(of.q, of.key, of.value, of.last, of.total, of.heads, of.kv_heads)
    return encode.eager(out.flatten(0, 1))


def _whole_rule(of: FusedAttention[TensorType]) -> tuple[TensorType, TensorType]:
    name, qkv, heads = "attention_fp8", of.qkv, of.heads
    count = heads + 2 * of.kv_heads
    need(heads % of.kv_heads == 0, name, "heads", heads, f"a multiple of {of.kv_heads}")
    fits = len(qkv.shape) == 2 and qkv.shape[1] % count == 0
    need(fits, name, "qkv", qkv.shape, f"{count} heads")
    batch, rows, size = of.key.shape[0], qkv.shape[0], qkv.shape[1] // count
    need(qkv.dtype == of.key.dtype, name, "dtypes", (qkv, of.key), "one dtype")
    _need_buffers(name, of, batch, size)
    _need_tables(name, of, batch, None, size)  # S is not in a packed shape
    need(of.total == TensorType((), torch.int32), name, "total", of.total, "an int32 scalar")
    return encoded(rows, heads * size)


@op(
    "attention_fp8(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? temperature, Tensor(a!) key, "
    "Tensor(b!) value, Tensor last, Tensor total, int heads, int kv_heads, float? eps) "
    "-> (Tensor, Tensor)",
    _whole_rule,
    FusedAttention,
)
def attention_fp8(of: FusedAttention[Tensor]) -> tuple[Tensor, Tensor]:
    """`rope_append`, then `attend_fp8`, in one op, on packed tokens."""
    qkv, tables = of.qkv.unflatten(0, (len(of.key), -1)), (of.cos, of.sin, of.temperature)
    buffers, heads = (of.key, of.value, of.last), (of.heads, of.kv_heads)
    q = rope_append.eager(qkv, *tables, *buffers, *heads, of.eps)
    return attend_fp8.eager(q, *buffers, of.total, *heads)


def _slots(name: str, last: Tensor, steps: int, buffer: Tensor) -> Tensor:
    """The slot of each token of a call, [B, S]."""
    first, end = int(last.min()) - steps + 1, int(last.max())
    fits = first >= 0 and end < buffer.shape[2]
    need(fits, name, "last", f"slots {first} to {end}", f"0 to {buffer.shape[2] - 1}")
    return last.long()[:, None] + torch.arange(1 - steps, 1, device=last.device)
