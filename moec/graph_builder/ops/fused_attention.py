"""Fused attention over buffers in place: positions and appending in one op, the rest in another.

The buffers are those of `buffers`: a call's S tokens go to slots `last - S + 1` to `last` of their
row, each query sees the slots up to its own, and no call crosses the end of a chunk.
"""

import torch
from torch import Tensor

from moec.graph_builder.ops.attention import attention, head_norm, scale_queries
from moec.graph_builder.ops.fused import encode, encoded
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.ops.rope import rope
from moec.graph_builder.types import Dim, TensorType, times


def _need_buffers(
    name: str, batch: object, size: object, kv_heads: int, *operands: TensorType
) -> None:
    """Check key, value [B, kv_heads, N, d] and last [B]."""
    key, value, last = operands
    fits = len(key.shape) == 4 and (key.shape[0], key.shape[1], key.shape[3]) == (
        batch,
        kv_heads,
        size,
    )
    need(fits and value == key, name, "key, value", (key, value), f"[B, {kv_heads}, N, {size}]")
    need(last == TensorType((batch,), torch.int32), name, "last", last, f"int32 [{batch}]")


def _need_tables(
    name: str,
    batch: Dim,
    steps: Dim | None,
    size: Dim,
    cos: TensorType | None,
    sin: TensorType | None,
    temperature: TensorType | None,
) -> None:
    """Check cos, sin [B, S, d/2] and temperature [B, S, 1]; without `steps`, S is theirs to say."""
    need((cos is None) == (sin is None), name, "cos, sin", (cos, sin), "both or neither")
    for label, table, width in (
        ("cos", cos, size // 2),
        ("sin", sin, size // 2),
        ("temperature", temperature, 1),
    ):
        if table is not None:
            count = table.shape[1] if steps is None else steps
            expected = TensorType((batch, count, width), torch.float32)
            need(table == expected, name, label, table, expected)


def _rope_rule(
    qkv: TensorType,
    cos: TensorType | None,
    sin: TensorType | None,
    temperature: TensorType | None,
    key: TensorType,
    value: TensorType,
    last: TensorType,
    heads: int,
    kv_heads: int,
    eps: float | None,
) -> TensorType:
    name = "rope_append"
    parts = heads + 2 * kv_heads
    fits = len(qkv.shape) == 3 and qkv.shape[2] % parts == 0
    need(fits, name, "qkv", qkv.shape, f"width in {parts} heads")
    batch, steps, size = *qkv.shape[:2], qkv.shape[2] // parts
    need(qkv.dtype == key.dtype, name, "dtypes", (qkv, key), "one dtype")
    _need_buffers(name, batch, size, kv_heads, key, value, last)
    _need_tables(name, batch, steps, size, cos, sin, temperature)
    return qkv.like(batch, steps, heads * size)


@op(
    "rope_append(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? temperature, Tensor(a!) key, "
    "Tensor(b!) value, Tensor last, int heads, int kv_heads, float? eps) -> Tensor",
    _rope_rule,
)
def rope_append(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    temperature: Tensor | None,
    key: Tensor,
    value: Tensor,
    last: Tensor,
    heads: int,
    kv_heads: int,
    eps: float | None,
) -> Tensor:
    """qkv [B, S, (heads + 2*kv_heads)*d] -> queries [B, S, heads*d]; keys and values are appended.

    Queries and keys are turned by cos and sin [B, S, d/2], then normalised with `eps`, each where
    given; queries are scaled by temperature [B, S, 1]. Keys and values are written into the buffers
    key and value [B, kv_heads, N, d], in place. Each step is rounded to qkv's dtype.

    Raises:
        MoecError: the tokens of a row do not fit its buffer.
    """
    steps, size = qkv.shape[1], key.shape[3]
    q, k, v = qkv.split([heads * size, kv_heads * size, kv_heads * size], 2)
    if cos is not None:
        q, k = rope.eager(q, cos, sin, heads), rope.eager(k, cos, sin, kv_heads)
    if eps is not None:
        q, k = head_norm.eager(q, heads, eps), head_norm.eager(k, kv_heads, eps)
    if temperature is not None:
        q = scale_queries.eager(q, temperature)
    at = _slots("rope_append", last, steps, key)
    rows = torch.arange(len(qkv), device=qkv.device)[:, None]
    for buffer, new in ((key, k), (value, v)):
        buffer[rows, :, at] = new.unflatten(2, (kv_heads, size))  # [B, S, kv_heads, d]
    return q.clone()  # a result of its own, no view of qkv


def _attend_rule(
    q: TensorType,
    key: TensorType,
    value: TensorType,
    last: TensorType,
    total: TensorType,
    heads: int,
    kv_heads: int,
) -> TensorType:
    name = "attend"
    need(heads % kv_heads == 0, name, "heads", heads, f"a multiple of {kv_heads}")
    need(len(q.shape) == 3 and q.shape[2] % heads == 0, name, "q", q.shape, f"{heads} heads")
    need(q.dtype == key.dtype, name, "dtypes", (q, key), "one dtype")
    _need_buffers(name, q.shape[0], q.shape[2] // heads, kv_heads, key, value, last)
    need(total == TensorType((), torch.int32), name, "total", total, "an int32 scalar")
    return q


@op(
    "attend(Tensor q, Tensor key, Tensor value, Tensor last, Tensor total, int heads, "
    "int kv_heads) -> Tensor",
    _attend_rule,
)
def attend(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    last: Tensor,
    total: Tensor,
    heads: int,
    kv_heads: int,
) -> Tensor:
    """q [B, S, heads*d] over buffers [B, kv_heads, N, d] -> [B, S, heads*d].

    `total`, a scalar on the CPU, is more than any slot of `last` [B]: slots from there on are not
    looked at.

    Raises:
        MoecError: `total` is not that, or more than N.
    """
    count = int(total)
    at = _slots("attend", last, q.shape[1], key)
    need(
        int(last.max()) < count <= key.shape[2],
        "attend",
        "total",
        count,
        f"above {int(last.max())}, at most {key.shape[2]}",
    )
    seen = torch.arange(count, device=q.device) <= at[..., None]  # [B, S, count]
    k, v = (buffer[:, :, :count].transpose(1, 2).flatten(2) for buffer in (key, value))
    return attention.eager(q, k, v, seen[:, None], heads, kv_heads)


def _attend_fp8_rule(q: TensorType, *rest: TensorType) -> tuple[TensorType, TensorType]:
    out = _attend_rule(q, *rest)  # type: ignore[arg-type]
    return encoded(times(*out.shape[:2]), out.shape[2])


@op(
    "attend_fp8(Tensor q, Tensor key, Tensor value, Tensor last, Tensor total, int heads, "
    "int kv_heads) -> (Tensor, Tensor)",
    _attend_fp8_rule,
)
def attend_fp8(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    last: Tensor,
    total: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """`attend`, rounded to q's dtype, packed: codes [B*S, heads*d] and scale [B*S]."""
    return encode.eager(attend.eager(q, key, value, last, total, heads, kv_heads).flatten(0, 1))


def _whole_rule(
    qkv: TensorType,
    cos: TensorType | None,
    sin: TensorType | None,
    temperature: TensorType | None,
    key: TensorType,
    value: TensorType,
    last: TensorType,
    total: TensorType,
    heads: int,
    kv_heads: int,
    eps: float | None,
) -> tuple[TensorType, TensorType]:
    name, parts = "attention_fp8", heads + 2 * kv_heads
    need(heads % kv_heads == 0, name, "heads", heads, f"a multiple of {kv_heads}")
    need(
        len(qkv.shape) == 2 and qkv.shape[1] % parts == 0, name, "qkv", qkv.shape, f"{parts} heads"
    )
    rows, size = qkv.shape[0], qkv.shape[1] // parts
    need(qkv.dtype == key.dtype, name, "dtypes", (qkv, key), "one dtype")
    _need_buffers(name, key.shape[0], size, kv_heads, key, value, last)
    _need_tables(
        name, key.shape[0], None, size, cos, sin, temperature
    )  # S is not in a packed shape
    need(total == TensorType((), torch.int32), name, "total", total, "an int32 scalar")
    return encoded(rows, heads * size)


@op(
    "attention_fp8(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? temperature, Tensor(a!) key, "
    "Tensor(b!) value, Tensor last, Tensor total, int heads, int kv_heads, float? eps) "
    "-> (Tensor, Tensor)",
    _whole_rule,
)
def attention_fp8(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    temperature: Tensor | None,
    key: Tensor,
    value: Tensor,
    last: Tensor,
    total: Tensor,
    heads: int,
    kv_heads: int,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    """qkv packed, [B*S, (heads + 2*kv_heads)*d]: `rope_append`, then `attend_fp8`, in one."""
    qkv = qkv.unflatten(0, (len(key), -1))
    q = rope_append.eager(qkv, cos, sin, temperature, key, value, last, heads, kv_heads, eps)
    return attend_fp8.eager(q, key, value, last, total, heads, kv_heads)


def _slots(name: str, last: Tensor, steps: int, buffer: Tensor) -> Tensor:
    """The slot of each token of a call, [B, S]."""
    first, end = int(last.min()) - steps + 1, int(last.max())
    fits = first >= 0 and end < buffer.shape[2]
    need(fits, name, "last", f"slots {first} to {end}", f"0 to {buffer.shape[2] - 1}")
    return last.long()[:, None] + torch.arange(1 - steps, 1, device=last.device)
