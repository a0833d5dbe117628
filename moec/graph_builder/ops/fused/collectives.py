"""Ops that ranks compute together: each gives the same result on all of them, to the bit.

Beside these are the ops that choose the likeliest tokens, of one process or of all ranks.

A rank is one of the processes that share a model (`moec.spec.sharding`). All of them run the same
ops in the same order. Sums are in the order of the ranks, in
float32, and are rounded once: results repeat to the bit.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from moec.graph_builder.ops.fused.layers import encode, moe_layer
from moec.graph_builder.ops.linear import rms_norm, skip_norm
from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.ops.tokens import embedding
from moec.graph_builder.types import TensorType, times, widened

Pair = tuple[TensorType, TensorType]
Triple = tuple[TensorType, TensorType, TensorType]


def by_torch(sent: Tensor) -> list[Tensor]:
    """The bytes `sent` of every rank, in order, through torch's process group.

    They go over the GPU if the group knows no other way, as one that a program has made may not.
    """
    group = dist.group.WORLD
    assert group is not None
    there = sent if sent.device in group._device_types or sent.is_cuda else sent.cuda()
    found = [torch.empty_like(there) for _ in range(group.size())]
    dist.all_gather(found, there)
    return [each.to(sent.device) for each in found]


#: how bytes on the host are exchanged; `moec.runtime.ranks.sockets` has another way
exchange: Callable[[Tensor], list[Tensor]] = by_torch


def gathered(x: Tensor) -> list[Tensor]:
    """`x` of every rank, in order; all have one shape."""
    sent = x.contiguous().view(torch.uint8)
    found = by_torch(sent) if x.is_cuda else exchange(sent)
    return [each.view(x.dtype) for each in found]


def _summed(part: Tensor) -> Tensor:
    return reduce(torch.add, map(widened, gathered(part)))


def _embedding_rule(ids: TensorType, table: TensorType, first: int, dtype: str) -> TensorType:
    need(first >= 0, "embedding_part", "first", first, "0 or more")
    return embedding.rule(ids, table, dtype)  # type: ignore[return-value]


@op(
    "embedding_part(Tensor ids, Tensor table, int first, str dtype) -> Tensor",
    _embedding_rule,
)
def embedding_part(ids: Tensor, table: Tensor, first: int, dtype: str) -> Tensor:
    """`embedding` of the tokens whose rows are in table, from row `first` on; zeros for others."""
    at = ids - first
    mine = (at >= 0) & (at < len(table))
    rows = embedding.eager(at.where(mine, 0), table, dtype)
    return rows.where(mine.flatten()[:, None], 0)


@op("all_reduce(Tensor part) -> Tensor", lambda part: part)
def all_reduce(part: Tensor) -> Tensor:
    """The sum of the ranks' partial sums [T, D]."""
    return _summed(part).to(part.dtype)


def _norm_rule(
    x: TensorType, part: TensorType, weight: TensorType, eps: float, whole: bool
) -> Pair:
    return skip_norm.rule(x, part, weight, eps)  # type: ignore[return-value]


@op(
    "all_reduce_norm(Tensor x, Tensor part, Tensor weight, float eps, bool whole) "
    "-> (Tensor, Tensor)",
    _norm_rule,
)
def all_reduce_norm(
    x: Tensor, part: Tensor, weight: Tensor, eps: float, whole: bool
) -> tuple[Tensor, Tensor]:
    """rms_norm of x plus the ranks' partial sums [T, D]; and that total.

    Unless `whole`, only the next sum uses the total, and the results are not used after it. Then a
    rank may have only those rows of the total that the next sum takes from it.
    """
    total = (widened(x) + _summed(part)).to(x.dtype)
    return rms_norm.eager(total, weight, eps), total


def _fp8_rule(
    x: TensorType, part: TensorType, weight: TensorType, eps: float, whole: bool
) -> Triple:
    _norm_rule(x, part, weight, eps, whole)
    codes, scale = encode.rule(x)  # type: ignore[misc]
    return codes, scale, x


@op(
    "all_reduce_norm_fp8(Tensor x, Tensor part, Tensor weight, float eps, bool whole) "
    "-> (Tensor, Tensor, Tensor)",
    _fp8_rule,
)
def all_reduce_norm_fp8(
    x: Tensor, part: Tensor, weight: Tensor, eps: float, whole: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`all_reduce_norm` as quantised values [T, D] and scale [T]; and the total."""
    normed, total = all_reduce_norm.eager(x, part, weight, eps, whole)
    return *encode.eager(normed), total


def _moe_rule(
    total: TensorType, normed: TensorType, eps: float, whole: bool, *layer: TensorType
) -> Triple:
    *weights, after = layer
    part: TensorType = moe_layer.rule(normed, *weights)  # type: ignore[assignment]
    return _fp8_rule(total, part, after, eps, whole)


@op(
    "moe_all_reduce_norm_fp8(Tensor total, Tensor normed, float eps, bool whole, Tensor router, "
    "Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor after) "
    "-> (Tensor, Tensor, Tensor)",
    _moe_rule,
)
def moe_all_reduce_norm_fp8(
    total: Tensor, normed: Tensor, eps: float, whole: bool, *layer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`moe_layer` of normed, each rank's part; then `all_reduce_norm_fp8` by `after`."""
    *weights, after = layer
    return all_reduce_norm_fp8.eager(total, moe_layer.eager(normed, *weights), after, eps, whole)


def _gather_rule(part: TensorType, sizes: Sequence[int]) -> TensorType:
    fits = part.shape[-1] in sizes
    need(fits, "all_gather", "part", part.shape, f"a width of {list(sizes)}")
    return part.like(*part.shape[:-1], sum(sizes))


@op("all_gather(Tensor part, int[] sizes) -> Tensor", _gather_rule)
def all_gather(part: Tensor, sizes: Sequence[int]) -> Tensor:
    """The ranks' parts [..., N], whose widths are `sizes`, one after another."""
    room = torch.nn.functional.pad(part, (0, max(sizes) - part.shape[-1]))
    found = zip(gathered(room), sizes, strict=True)
    return torch.cat([each[..., :size] for each, size in found], -1)


def _likeliest_rule(logits: TensorType) -> TensorType:
    need(len(logits.shape) == 2, "likeliest", "logits", logits.shape, "[T, V]")
    return TensorType(logits.shape[:1], torch.int64)


@op("likeliest(Tensor logits) -> Tensor", _likeliest_rule)
def likeliest(logits: Tensor) -> Tensor:
    """logits [T, V] -> the token with the largest, int64 [T]; of equal ones the first."""
    return logits.argmax(-1)


@op(
    "likeliest_part(Tensor part, int first) -> Tensor",
    lambda part, first: _likeliest_rule(part),
)
def likeliest_part(part: Tensor, first: int) -> Tensor:
    """`likeliest` of the logits of all ranks; those of this rank begin with token `first`."""
    best = part.argmax(-1)
    values = torch.stack(gathered(part.gather(-1, best[:, None])[:, 0].float()))  # [ranks, T]
    tokens = torch.stack(gathered(best + first))
    return tokens.gather(0, values.argmax(0, keepdim=True))[0]


def _rows_rule(x: TensorType, like: TensorType) -> TensorType:
    need(
        x.shape == (times(*like.shape),),
        "rows_like",
        "x",
        x.shape,
        f"an element for each of {like.shape}",
    )
    return x.like(*like.shape)


@op("rows_like(Tensor x, Tensor like) -> Tensor", _rows_rule)
def rows_like(x: Tensor, like: Tensor) -> Tensor:
    """x [B*L], like [B, L] -> [B, L]."""
    return x.reshape(like.shape).clone()
