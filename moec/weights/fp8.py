"""From wide weights to E4M3 codes and scales, some rows at a time.

A scale is the largest magnitude that it is for, over 448, so nothing saturates. Work goes by a few
rows: so a piece stays in the processor's cache between its steps, which is five times as fast.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from moec.spec.scheme import LARGEST

#: elements of a step
STEP = 1 << 18
#: a wide dtype -> the integers of its width, and all bits but the sign
_BITS = {
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
}


def magnitudes(rows: Tensor, along: str, block: int) -> Tensor:
    """The largest magnitudes of rows [n, m]: by "row" [n], "column" [m], "block" or "all" [].

    Blocks start at the first row. Found on the bits, whose order is that of magnitudes, infinity
    and NaN last: a result that is not finite says that some element is not.
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
    """Scales for magnitudes, in `dtype`, never subnormal; 1 for weights that are all zero."""
    found = (magnitude / LARGEST).clamp(min=torch.finfo(dtype).smallest_normal)
    return torch.where(magnitude > 0, found, 1.0).to(dtype)


def codes(rows: Tensor, scale: Tensor, along: str, block: int, out: Tensor) -> None:
    """E4M3 codes of rows [n, m], into `out`; `scale` as `magnitudes` has it for these rows."""
    at = 0
    for step in _steps(rows, along, block):
        wide = step.float()
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
    """rows [n, m], filled up with zeros where need be -> [n / block, block, m / block, block]."""
    missing = -rows.shape[0] % block, -rows.shape[1] % block
    if any(missing):
        rows = functional.pad(rows, (0, missing[1], 0, missing[0]))
    return rows.view(rows.shape[0] // block, block, rows.shape[1] // block, block)


def _steps(rows: Tensor, along: str, block: int) -> Iterator[Tensor]:
    count = max(1, STEP // max(1, rows.shape[1]))
    if along == "block":
        count = max(block, count // block * block)
    return iter(torch.split(rows, count))
