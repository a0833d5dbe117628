"""Parts of heads, which multi-head latent attention takes apart and puts together."""

import torch
from torch import Tensor

from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType


def _take_rule(x: TensorType, heads: int, start: int, stop: int) -> TensorType:
    need(x.shape[-1] % heads == 0, "take_part", "x", x.shape, f"width in {heads} heads")
    size = x.shape[-1] // heads
    need(0 <= start < stop <= size, "take_part", "start, stop", (start, stop), f"0 to {size}")
    return x.like(*x.shape[:-1], heads * (stop - start))


@op("take_part(Tensor x, int heads, int start, int stop) -> Tensor", _take_rule)
def take_part(x: Tensor, heads: int, start: int, stop: int) -> Tensor:
    """Elements start to stop - 1 of each head of x [..., heads*d]."""
    return x.unflatten(-1, (heads, -1))[..., start:stop].flatten(-2)


def _join_rule(x: TensorType, y: TensorType, heads: int) -> TensorType:
    need(x.shape[:-1] == y.shape[:-1], "join_parts", "x, y", (x, y), "one number of tokens")
    for name, each in (("x", x), ("y", y)):
        need(each.shape[-1] % heads == 0, "join_parts", name, each, f"width in {heads} heads")
    return x.like(*x.shape[:-1], x.shape[-1] + y.shape[-1])


@op("join_parts(Tensor x, Tensor y, int heads) -> Tensor", _join_rule)
def join_parts(x: Tensor, y: Tensor, heads: int) -> Tensor:
    """Heads whose elements are those of x [..., heads*a], then those of y [..., heads*b]."""
    return torch.cat([each.unflatten(-1, (heads, -1)) for each in (x, y)], -1).flatten(-2)


def _linear_rule(
    x: TensorType, weight: TensorType, heads: int, start: int, stop: int, out: bool
) -> TensorType:
    rows, columns = weight.shape
    need(rows % heads == 0, "head_linear", "weight", weight.shape, f"rows in {heads} heads")
    size = rows // heads
    need(0 <= start < stop <= size, "head_linear", "start, stop", (start, stop), f"0 to {size}")
    wide, narrow = (columns, stop - start) if out else (stop - start, columns)
    need(x.shape[-1] == heads * wide, "head_linear", "x", x.shape, f"width {heads * wide}")
    return x.like(*x.shape[:-1], heads * narrow)


@op(
    "head_linear(Tensor x, Tensor weight, int heads, int start, int stop, bool out) -> Tensor",
    _linear_rule,
)
def head_linear(x: Tensor, weight: Tensor, heads: int, start: int, stop: int, out: bool) -> Tensor:
    """A product for each head of x, with rows start to stop - 1 of its part of weight [heads*r, c].

    With `out` these rows make the outputs: x [..., heads*c] -> [..., heads*(stop - start)].
    Otherwise they take the inputs: x [..., heads*(stop - start)] -> [..., heads*c].
    """
    parts = weight.to(x.dtype).unflatten(0, (heads, -1))[:, start:stop]  # [heads, stop - start, c]
    each = x.unflatten(-1, (heads, -1)).movedim(-2, 0).flatten(1, -2)  # [heads, tokens, ...]
    found = torch.bmm(each, parts.mT if out else parts)
    return found.unflatten(1, x.shape[:-1]).movedim(0, -2).flatten(-2)
