"""Shapes and dtypes that flow through the graph, with symbolic dimensions."""

from dataclasses import dataclass
from typing import Any

import torch

#: A size: an int, a symbol such as "batch" or "batch*sequence", or a SymInt under FakeTensor.
Dim = Any


@dataclass(frozen=True, slots=True)
class TensorType:
    """What is known of a value before it exists."""

    shape: tuple[Dim, ...]
    dtype: torch.dtype

    def like(self, *shape: Dim) -> "TensorType":
        """Another shape, the same dtype."""
        return TensorType(shape, self.dtype)


def times(left: Dim, right: Dim) -> Dim:
    """The product of two sizes; a symbol where either is one."""
    if isinstance(left, str) or isinstance(right, str):
        return f"{left}*{right}"
    return left * right


def plus(left: Dim, right: Dim) -> Dim:
    """The sum of two sizes; a symbol where either is one."""
    if isinstance(left, str) or isinstance(right, str):
        return f"{left}+{right}"
    return left + right
