"""The types of values in a graph: a shape, which may have symbolic sizes, and a dtype."""

from dataclasses import dataclass
from typing import Any

import torch

#: A size: an int, a symbol such as "batch" or "batch*sequence", or a SymInt under FakeTensor.
Dim = Any


@dataclass(frozen=True, slots=True)
class TensorType:
    """The shape and the dtype of a value, known before the value is computed."""

    shape: tuple[Dim, ...]
    dtype: torch.dtype

    def like(self, *shape: Dim) -> "TensorType":
        """The type with another shape and the same dtype."""
        return TensorType(shape, self.dtype)


def times(left: Dim, right: Dim) -> Dim:
    """The product of two sizes. It is a symbol if either size is one."""
    if isinstance(left, str) or isinstance(right, str):
        return f"{left}*{right}"
    return left * right


def plus(left: Dim, right: Dim) -> Dim:
    """The sum of two sizes. It is a symbol if either size is one."""
    if isinstance(left, str) or isinstance(right, str):
        return f"{left}+{right}"
    return left + right


def widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, where the ops do what half precision cannot; float64 stays float64.

    A proof runs the ops in float64 to see the rounding of float32.
    """
    return x if x.dtype == torch.float64 else x.float()
