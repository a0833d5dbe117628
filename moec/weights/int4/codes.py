"""4-bit integers as torch tensors: two in a byte, the first one in the low half."""

import torch
from torch import Tensor


def unpacked(codes: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 2n], each 0 to 15."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def pairs(values: Tensor) -> Tensor:
    """The inverse of `unpacked`; an odd row gets a zero at its end."""
    if values.shape[-1] % 2:
        values = torch.cat([values, torch.zeros_like(values[..., :1])], -1)
    return values[..., 0::2] | values[..., 1::2] << 4


def zero_points(zero: Tensor, rows: int) -> Tensor:
    """The zero points [out, groups] of a checkpoint's tensor [out/8, groups, 4]."""
    return unpacked(zero).transpose(1, 2).flatten(0, 1)[:rows]


def in_eights(zero: Tensor) -> Tensor:
    """The inverse of `zero_points`; rows that fill up the last eight have 8."""
    rows, groups = zero.shape
    full = torch.full((-(-rows // 8) * 8, groups), 8, dtype=torch.uint8)
    full[:rows] = zero
    return pairs(full.view(-1, 8, groups).transpose(1, 2))
