"""Cut RGB images into image tiles, bit for bit as Hugging Face's Llama 4 image processor does.

The processor resizes with torch's antialiased bilinear interpolation on uint8, and so does this
module. Pillow's resize differs by one level in up to 0.4 % of the samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moec.spec.bounded.limits import CANVAS
from moec.spec.errors import refuse
from moec.spec.fields import Fields, read_json, shown

Three = tuple[float, float, float]

#: fields of the settings that the processor ignores, or that only say how it is called
INERT = """
    image_processor_type processor_class crop_size data_format default_to_square device
    do_center_crop input_data_format return_tensors disable_grouping do_pad pad_size
    image_seq_length
""".split()

_NEXT = "correct the field, or remove the file to use the settings of the released models"


@dataclass(frozen=True, slots=True)
class Tiling:
    """How to cut an image into tiles. The defaults are those of the released models.

    Attributes:
        side: pixels along one side of a square tile; the image size of the vision tower.
        most: the largest number of tiles in a canvas.
        fill_canvas: enlarge a small image as far as `most` tiles allow, instead of up to one tile.
        rescale: factor for uint8 pixels.
        mean: subtracted from the rescaled pixels, for each channel.
        std: divides the result, for each channel.
    """

    side: int
    most: int = 16
    fill_canvas: bool = False
    rescale: float = 1 / 255
    mean: Three = (0.5, 0.5, 0.5)
    std: Three = (0.5, 0.5, 0.5)


def tile(image: Image.Image, tiling: Tiling) -> tuple[Tensor, tuple[int, int]]:
    """Cut `image`, which has mode RGB, into tiles.

    Returns:
        The tiles, float32 [n, 3, side, side] with bfloat16 values, in the order of rows; and the
        canvas as (rows, columns). If rows * columns > 1, one more tile comes last: the global tile,
        which is the whole image resized to a square.
    """
    # a view [1, 3, height, width]; torch resizes interleaved channels without a copy
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    side, grid = tiling.side, canvas(image.height, image.width, tiling)
    rows, columns = grid
    height, width = fitted(image.height, image.width, grid, tiling)
    if rows * columns * side**2 > CANVAS:
        refuse(
            "image",
            f"{image.width} x {image.height} pixels, which make {rows} x {columns} tiles of "
            f"{side} x {side} pixels",
            f"at most {CANVAS:,} pixels in all tiles, which is far above any known model",
            "scale the image down, or correct max_patches in the processor's settings",
        )
    sheet = torch.zeros(3, rows * side, columns * side, dtype=torch.uint8)
    sheet[:, :height, :width] = _resize(pixels, height, width)
    tiles = sheet.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if len(tiles) > 1:
        tiles = torch.cat([tiles, _resize(pixels, side, side)])
    table = _table(tiling)
    out = torch.empty(tiles.shape)
    # Work tile by tile, because each index takes 8 bytes.
    for levels, normal in zip(tiles, out, strict=True):
        normal.view(3, -1).copy_(table.gather(1, levels.reshape(3, -1).long()))
    return out, grid


def canvas(height: int, width: int, tiling: Tiling) -> tuple[int, int]:
    """The (rows, columns) of tiles for an image of `height` x `width` pixels.

    The candidates are all grids of at most `tiling.most` tiles. If the image fits into some of them
    without shrinking, the tightest of these is taken, or with `fill_canvas` the one that enlarges
    the image most. If it fits into none, the grid that shrinks it least is taken.
    """
    most = tiling.most
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    # the processor computes this in float32
    sides = (np.array(grids) * tiling.side).astype(np.float32)
    scales = (sides / np.array([height, width], dtype=np.float32)).min(axis=1)
    enlarging = scales[scales >= 1]
    best = enlarging.min() if enlarging.size and not tiling.fill_canvas else scales.max()
    # The grid with the smallest area is unique. If two had the same area and scale, the smaller
    # rows of one and the smaller columns of the other would make a smaller grid of that scale.
    return min((grid for grid, s in zip(grids, scales, strict=True) if s == best), key=math.prod)


def fitted(height: int, width: int, grid: tuple[int, int], tiling: Tiling) -> tuple[int, int]:
    """The (height, width) in pixels to which an image is resized for `grid`; each is at least 1.

    The processor computes a scale in float32 if the grid sets the limit, and in float64 if the
    image does. It rounds sizes down, so that the last pixel depends on the precision.
    """
    limits: list[int] = []
    kinds: list[type[np.float32] | type[np.float64]] = []
    for size, tiles in zip((height, width), grid, strict=True):
        edge, own = tiles * tiling.side, max(size, tiling.side)
        by_grid = tiling.fill_canvas or edge < own
        limits.append(edge if by_grid else own)
        kinds.append(np.float32 if by_grid else np.float64)
    (tall, wide), (kind_h, kind_w) = limits, kinds
    scale_h, scale_w = kind_h(tall) / kind_h(height), kind_w(wide) / kind_w(width)
    # If the precisions differ, the float32 scale is below 1 and the float64 scale is not. Rounding
    # cannot change their order.
    if float(scale_w) < float(scale_h):
        tall = min(math.floor(kind_w(height) * scale_w), tall)
    else:
        wide = min(math.floor(kind_h(width) * scale_h), wide)
    return max(tall, 1), max(wide, 1)


def read_tiling(find: Callable[[str], Path | None], side: int) -> Tiling:
    """Read the tiling from a checkpoint's processor files; the default is the released models'.

    Args:
        find: finds the path of a file by its name, or None; such as `Artefact.companion`.
        side: the image size of the vision tower, in pixels.

    Raises:
        MoecError: a field is unknown, has a wrong type, or asks for arithmetic that is not
            supported.
    """
    fields = _fields(find)
    if fields is None:
        return Tiling(side)
    for switch in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        fields.require(switch, True, default=True)
    fields.require("resample", 2, default=2)  # bilinear
    separator = "." if ":" in fields.where else ": "
    size = Fields(f"{fields.where}{separator}size", fields.take("size", dict, default={}), _NEXT)
    for edge in ("height", "width"):
        size.require(edge, side, default=side)
    size.finish(())
    tiling = Tiling(
        side,
        most=fields.size("max_patches", most=1024) if "max_patches" in fields else 16,
        fill_canvas=fields.take("resize_to_max_canvas", bool, default=False),
        rescale=float(fields.take("rescale_factor", float, default=1 / 255)),
        mean=_three(fields, "image_mean"),
        std=_three(fields, "image_std"),
    )
    if not _table(tiling).isfinite().all():
        raise fields.error(
            "image_std",
            f"{list(tiling.std)}, image_mean {list(tiling.mean)}, rescale_factor {tiling.rescale}",
            "numbers that give finite pixels in bfloat16",
        )
    fields.finish(INERT)
    return tiling


def _fields(find: Callable[[str], Path | None]) -> Fields | None:
    """The image processor's settings, or None.

    transformers 5 nests them in processor_config.json, and prefers that file.
    """
    path = find("processor_config.json")
    if path is not None:
        outer = Fields(str(path), read_json(path), _NEXT)
        nested = outer.take("image_processor", dict, default=None)
        if nested is not None:
            return Fields(f"{path}: image_processor", nested, _NEXT)
    path = find("preprocessor_config.json")
    return None if path is None else Fields(str(path), read_json(path), _NEXT)


def _three(fields: Fields, key: str) -> Three:
    values = fields.take(key, list, default=[0.5, 0.5, 0.5])
    numbers = [float(v) for v in values if type(v) in (int, float) and abs(v) < 1e300]
    if not len(numbers) == len(values) == 3:
        raise fields.error(key, shown(values), "three numbers, for red, green and blue")
    return numbers[0], numbers[1], numbers[2]


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 pixels [1, 3, H, W] to [1, 3, height, width]."""
    if pixels.shape[2:] == (height, width):
        return pixels
    return torch.nn.functional.interpolate(
        pixels, (height, width), mode="bilinear", antialias=True, align_corners=False
    )


def _table(tiling: Tiling) -> Tensor:
    """The normalised value of each uint8 level in each channel, float32 [3, 256].

    Each step of the arithmetic rounds to bfloat16.
    """
    levels = torch.arange(256).to(torch.bfloat16) * tiling.rescale
    mean, std = (
        torch.tensor(three, dtype=torch.bfloat16)[:, None] for three in (tiling.mean, tiling.std)
    )
    return ((levels - mean) / std).float()
