"""Quantise weights to 4-bit integers as compressed-tensors stores them, for random checkpoints."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moec.spec import names
from moec.weights.int4.codes import in_eights, pairs
from moec.weights.view import STORED


def quantise(
    name: str, weight: Tensor, grid: str, group: int, zero_points: bool, dtype: str
) -> Iterator[tuple[str, Tensor]]:
    """The tensors, by our names, of a weight [out, in]; `grid` is a key of `INT4_WEIGHTS`.

    Without `zero_points` the largest magnitude of a group is 7 steps away from 8; with them, the
    numbers from the smallest to the largest are 15 steps, and zero is one of them.
    """
    rows, columns = weight.shape
    wide = weight.float().view(rows, -1, group if grid == "group" else columns)
    if zero_points:
        low, high = wide.amin(2).clamp(max=0), wide.amax(2).clamp(min=0)
        scale = _scale((high - low) / 15, dtype)
        zero = (-low / scale.float()).round().clamp(0, 15)
    else:
        scale = _scale(wide.abs().amax(2) / 7, dtype)
        zero = torch.full(scale.shape, 8.0)
    codes = (wide / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    yield name, pairs(codes.view(rows, columns).to(torch.uint8))
    yield names.scale_of(name), scale
    if zero_points:
        yield names.zero_point_of(name), in_eights(zero.to(torch.uint8))


def in_words(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of a checkpoint that store `tensor` at `key`: int32 for 4-bit integers."""
    if tensor.dtype != torch.uint8:
        return {key: tensor}
    words = tensor.reshape(-1).view(torch.int32)
    if tensor.dim() == 3:
        return {key: words.view(tensor.shape[:2])}
    words = words.view(len(tensor), -1)
    shape = torch.tensor([tensor.shape[0], 2 * tensor.shape[1]])
    return {key: words, key.removesuffix("_packed") + "_shape": shape}


def _scale(size: Tensor, dtype: str) -> Tensor:
    return torch.where(size > 0, size, 1.0).to(STORED[dtype])
