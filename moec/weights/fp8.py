"""Quantise weights to E4M3 values and scales, a few rows at a time.

A scale is the largest magnitude of the values that share it, divided by 448, so that no value
saturates. The code works on a few rows at a time because they then stay in the processor's cache
between the steps, which is five times as fast.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from moec.spec.scheme import LARGEST

#: elements that are worked on at once
STEP = 1 << 18
#: for each type of weights, the integer type of the same width, and a mask without the sign bit
_BITS = {
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
}


def along_of(kind: str | None, stacked: bool) -> str:
    """Which elements of a matrix share a scale, for a packing's `fp8`, as `magnitudes` takes it.

    The outputs of a plain weight are its rows; those of `stacked` experts are their columns.
    """
    named = {"tensor": "all", "expert": "all", "block": "block"}
    return named.get(kind or "", "column" if stacked else "row")


def magnitudes(rows: Tensor, along: str, block: int) -> Tensor:
    """The largest magnitudes of `rows` [n, m], as float32.

    `along` says which elements are taken together: "row" gives [n], "column" [m], "all" [], and
    "block" [n / block, m / block], where the first block starts at the first row.

    The function compares bits, which have the same order as magnitudes, with infinity and NaN
    last. A result that is not finite therefore means that some element is not finite.
    """
    bits, mask = _BITS[rows.dtype]
    found = [_largest(step.view(bits) & mask, along, block) for step in _steps(rows, along, block)]
    joined = torch.cat(found) if along in ("row", "block") else torch.stack(found).amax(0)
    return joined.view(rows.dtype).float()


def _largest(size: Tensor, along: str, block: int) -> Tensor:
    if along in ("row", "column"):
        return size.amax(1 if along == "row" else 0)
    if along == "all":
        return size.amax()
    return _squares(size, block).amax((1, 3))


def scales(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales for magnitudes, in `dtype`: never subnormal, and 1 where all weights are zero."""
    found = (magnitude / LARGEST).clamp(min=torch.finfo(dtype).smallest_normal)
    return torch.where(magnitude > 0, found, 1.0).to(dtype)


def quantise(rows: Tensor, scale: Tensor, along: str, block: int, out: Tensor) -> None:
    """Write the quantised values (E4M3) of `rows` [n, m] to `out` [n, m].

    `scale` has the shape that `magnitudes` gives for `rows` and `along`.
    """
    at = 0
    for step in _steps(rows, along, block):
        # A copy, because float() of float32 rows would be the rows themselves: the caller's.
        wide = step.to(torch.float32, copy=True)
        count = len(step)
        if along == "row":
            wide /= scale[at : at + count, None]
        elif along == "block":
            wide = _squares(wide, block)
            wide /= scale[at // block : -(-(at + count) // block), None, :, None]
            wide = wide.flatten(2).flatten(0, 1)[:count, : rows.shape[1]]
        else:
            wide /= scale
        out[at : at + count].copy_(wide)
        at += count


def _squares(rows: Tensor, block: int) -> Tensor:
    """Reshape rows [n, m], padded with zeros, to [n / block, block, m / block, block]."""
    missing = -rows.shape[0] % block, -rows.shape[1] % block
    if any(missing):
        rows = functional.pad(rows, (0, missing[1], 0, missing[0]))
    return rows.view(rows.shape[0] // block, block, rows.shape[1] // block, block)


def _steps(rows: Tensor, along: str, block: int) -> Iterator[Tensor]:
    count = max(1, STEP // max(1, rows.shape[1]))
    if along == "block":
        count = max(block, count // block * block)
    return iter(torch.split(rows, count))
