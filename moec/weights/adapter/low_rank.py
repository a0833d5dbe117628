"""The change that a LoRA adapter makes to one weight: a product of two narrow matrices."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moec.weights.shard import TensorEntry
from moec.weights.view import view

#: elements that are merged at once, so that they stay in a core's cache
ELEMENTS = 1 << 17


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a weight: `scale` times `up` times `down`, in float32.

    Attributes:
        down: "lora_A", of shape [experts * rank, n].
        up: "lora_B", of shape [m, rank * experts].
        scale: the factor of the product.
        turned: whether the weight is [n, m], and the product is transposed; else it is [m, n].
        experts: the matrices of a stacked weight; 1 for any other.
        expert: the matrix that the weight is, if it is one of a stack.
    """

    down: TensorEntry
    up: TensorEntry
    scale: float
    turned: bool = False
    experts: int = 1
    expert: int | None = None

    def of(self, expert: int) -> "LowRank":
        """The change of one matrix of a stacked weight."""
        return replace(self, expert=expert)

    def rows(self, matrix: int, start: int, stop: int) -> Tensor:
        """What is added to rows `start` to `stop` of matrix `matrix`, in float32.

        The terms of each element are added one after another. So the bits depend neither on how
        many rows are asked for nor on the CPU, as they would with a matrix product.
        """
        expert = matrix if self.expert is None else self.expert
        rank, inner, outer = (
            self.down.shape[0] // self.experts,
            self.down.shape[1],
            self.up.shape[0],
        )
        down = view(self.down).view(self.experts, rank, inner)[expert].float()
        up = view(self.up).view(outer, rank, self.experts)[:, :, expert].float()
        left, right = (down.T, up.T.contiguous()) if self.turned else (up, down)
        left = left[start:stop]
        total = torch.zeros(len(left), right.shape[1])
        term = torch.empty_like(total)
        for index in range(rank):
            total += torch.mul(left[:, index, None], right[index], out=term)
        return total.mul_(self.scale)


def merge_rows(entry: TensorEntry, first: int, out: Tensor) -> None:
    """Add the changes of `entry` to `out`, its elements from element `first` on, in whole rows.

    The sum is made in float32 and rounded once.
    """
    rows, columns = entry.shape[-2:]
    matrix, start = divmod(first // columns, rows)
    step = max(1, ELEMENTS // columns)
    for at, values in enumerate(torch.split(out.view(-1, columns), step)):
        total, row = values.float(), start + at * step
        for change in entry.changes:
            total += change.rows(matrix, row, row + len(values))
        values.copy_(total)


def merged(entry: TensorEntry, stored: Tensor) -> Tensor:
    """The weight at `entry` with its changes; `stored` are its own values."""
    out = torch.empty(entry.shape, dtype=stored.dtype).copy_(stored)
    rows, columns = entry.shape[-2:]
    for index, matrix in enumerate(out.view(-1, rows, columns)):
        merge_rows(entry, index * rows * columns, matrix)
    return out
