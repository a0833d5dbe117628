"""The ops of the vision tower alone: patches, class token, 2D rotary positions, pixel shuffle.

Each tile is one sequence of tokens: its patches in row-major order, then the class token, *last*.
"""

import torch
from torch import Tensor

from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType
from moec.weights.view import TORCH_DTYPES


def _patches_rule(pixels: TensorType, size: int, dtype: str) -> TensorType:
    need(len(pixels.shape) == 4, "patches", "pixels", pixels.shape, "[T, C, H, W]")
    tiles, channels, height, width = pixels.shape
    fits = size > 0 and height % size == 0 and width % size == 0
    need(fits, "patches", "size", size, f"a divisor of {height} and {width}")
    shape = (tiles, height // size * (width // size), channels * size**2)
    return TensorType(shape, TORCH_DTYPES[dtype])


@op("patches(Tensor pixels, int size, str dtype) -> Tensor", _patches_rule)
def patches(pixels: Tensor, size: int, dtype: str) -> Tensor:
    """pixels [T, C, H, W] -> patches [T, H/size * W/size, C*size*size] in `dtype`, row-major.

    A patch holds its pixels channel by channel, then row by row: the order of `nn.Unfold`.
    """
    grid = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [T, C, h, size, w, size]
    flat = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return flat.to(TORCH_DTYPES[dtype], copy=True)


def _tile_tokens_rule(x: TensorType, token: TensorType, positions: TensorType) -> TensorType:
    tiles, count, dim = x.shape
    need(token.shape == (dim,), "tile_tokens", "token", token.shape, f"[{dim}]")
    expected = (count + 1, dim)
    need(positions.shape == expected, "tile_tokens", "positions", positions.shape, expected)
    return x.like(tiles, count + 1, dim)


@op("tile_tokens(Tensor x, Tensor token, Tensor positions) -> Tensor", _tile_tokens_rule)
def tile_tokens(x: Tensor, token: Tensor, positions: Tensor) -> Tensor:
    """x [T, P, D], class token [D], positions [P + 1, D] -> [T, P + 1, D], class token last."""
    last = token.to(x.dtype).expand(len(x), 1, -1)
    return torch.cat([x, last], 1) + positions.to(x.dtype)


def patch_angles(side: int, dim: int, theta: float) -> Tensor:
    """Radians of each token's pairs, float32 [side * side + 1, dim / 2]; see `patch_rope_table`."""
    rates = 1.0 / theta ** (torch.arange(0, dim // 2, 2, dtype=torch.int64).float() / (dim // 2))
    steps = torch.arange(1, side + 1).float()[:, None] * rates  # [side, dim / 4]
    across = steps.expand(side, side, -1)  # by column
    down = steps[:, None].expand(side, side, -1)  # by row
    grid = torch.cat([across, down], -1).flatten(0, 1)
    return torch.cat([grid, torch.zeros(1, dim // 2)])


def _patch_rope_rule(
    like: TensorType, side: int, dim: int, theta: float
) -> tuple[TensorType, TensorType]:
    need(dim % 4 == 0, "patch_rope_table", "dim", dim, "a multiple of 4")
    fits = like.shape[1] == side**2
    need(fits, "patch_rope_table", "like", like.shape, f"[T, {side**2}, ...]")
    table = TensorType((like.shape[0], side**2 + 1, dim // 2), torch.float32)
    return table, table


@op(
    "patch_rope_table(Tensor like, int side, int dim, float theta) -> (Tensor, Tensor)",
    _patch_rope_rule,
)
def patch_rope_table(like: Tensor, side: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """For patches like [T, side*side, ...]: cos and sin, float32 [T, side*side + 1, dim/2].

    The first half of a head's pairs turns with the patch's column, the second with its row, both
    counted from 1; the class token, last, is not turned.
    """
    angles = patch_angles(side, dim, theta).to(like.device).expand(len(like), -1, -1)
    return angles.cos(), angles.sin()


def _shuffle_rule(x: TensorType, side: int, factor: int) -> TensorType:
    tiles, count, dim = x.shape
    need(count == side**2 + 1, "pixel_shuffle", "x", x.shape, f"[T, {side**2 + 1}, D]")
    need(factor > 0 and side % factor == 0, "pixel_shuffle", "factor", factor, f"divides {side}")
    return x.like(tiles, (side // factor) ** 2, dim * factor**2)


@op("pixel_shuffle(Tensor x, int side, int factor) -> Tensor", _shuffle_rule)
def pixel_shuffle(x: Tensor, side: int, factor: int) -> Tensor:
    """x [T, side*side + 1, D] -> [T, (side/factor)^2, D*factor^2]: the class token is dropped.

    Each token joins a square of factor x factor patches, row by row.
    """
    step = side // factor
    grid = x[:, :-1].unflatten(1, (step, factor, step, factor))  # [T, step, f, step, f, D]
    return grid.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
