"""RGB pixels to tiles, bit for bit as Hugging Face's Llama 4 image processor makes them.

Resizing is torch's antialiased bilinear on uint8, which is what that processor ends in. Pillow's
own resize differs from it by one level in up to 0.4 % of the samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moec.spec.fields import Fields, read_json

Three = tuple[float, float, float]

#: fields that the processor ignores, or that say how it is called
INERT = """
    image_processor_type processor_class crop_size data_format default_to_square device
    do_center_crop input_data_format return_tensors disable_grouping do_pad pad_size
    image_seq_length
""".split()

_NEXT = "correct the field; without the file, the released models' settings are taken"


@dataclass(frozen=True, slots=True)
class Tiling:
    """How an image is cut. The defaults are those of the released models.

    Attributes:
        side: pixels along a tile, which is square; the vision tower's image size.
        most: tiles in a canvas, at most.
        fill_canvas: enlarge a small image as far as `most` tiles allow, instead of up to one tile.
        rescale, mean, std: what uint8 pixels are multiplied by, less, divided by.
    """

    side: int
    most: int = 16
    fill_canvas: bool = False
    rescale: float = 1 / 255
    mean: Three = (0.5, 0.5, 0.5)
    std: Three = (0.5, 0.5, 0.5)


def tile(image: Image.Image, tiling: Tiling) -> tuple[Tensor, tuple[int, int]]:
    """The tiles of `image`, which is in mode RGB, and the canvas as (rows, columns).

    Returns:
        float32 [n, 3, side, side], values of bfloat16, row by row. If rows * columns > 1, one more
        tile comes last: the whole image, squeezed into a square.
    """
    # [1, 3, height, width], a view: torch resizes interleaved channels, without a copy
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    side, grid = tiling.side, canvas(image.height, image.width, tiling)
    rows, columns = grid
    height, width = fitted(image.height, image.width, grid, tiling)
    sheet = torch.zeros(3, rows * side, columns * side, dtype=torch.uint8)
    sheet[:, :height, :width] = _resize(pixels, height, width)
    tiles = sheet.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if len(tiles) > 1:
        tiles = torch.cat([tiles, _resize(pixels, side, side)])
    table = _table(tiling)
    out = torch.empty(tiles.shape)
    for levels, normal in zip(tiles, out, strict=True):  # by tile, since indices take 8 bytes each
        normal.view(3, -1).copy_(table.gather(1, levels.reshape(3, -1).long()))
    return out, grid


def canvas(height: int, width: int, tiling: Tiling) -> tuple[int, int]:
    """The (rows, columns) of tiles for an image of `height` x `width` pixels.

    Of all grids of at most `tiling.most` tiles: where the image fits as it is, the tightest, or
    with `fill_canvas` the roomiest; where it fits in none, the one that shrinks it least.
    """
    most = tiling.most
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    # float32, as the processor computes
    sides = (np.array(grids) * tiling.side).astype(np.float32)
    scales = (sides / np.array([height, width], dtype=np.float32)).min(axis=1)
    enlarging = scales[scales >= 1]
    best = enlarging.min() if enlarging.size and not tiling.fill_canvas else scales.max()
    # The smallest of these is unique: of two of one area, the lesser rows and the lesser columns
    # make a smaller one, of the same scale.
    return min((grid for grid, s in zip(grids, scales, strict=True) if s == best), key=math.prod)


def fitted(height: int, width: int, grid: tuple[int, int], tiling: Tiling) -> tuple[int, int]:
    """The (height, width) in pixels, each at least 1, to resize an image to, to fit `grid`.

    The processor computes a scale in float32 where the grid sets the limit, which is a tensor
    there, and in float64 where the image does. Both round down, so the last pixel depends on it.
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
    # of two kinds, the float32 one is below 1 and the other is not: no rounding can swap them
    if float(scale_w) < float(scale_h):
        tall = min(math.floor(kind_w(height) * scale_w), tall)
    else:
        wide = min(math.floor(kind_h(width) * scale_h), wide)
    return max(tall, 1), max(wide, 1)


def read_tiling(find: Callable[[str], Path | None], side: int) -> Tiling:
    """The tiling that a checkpoint's processor files ask for; without any, the released models'.

    Args:
        find: the path of a file by name, or None: `Artefact.companion`.
        side: the vision tower's image size, in pixels.

    Raises:
        MoecError: a field that is unknown, of a wrong type, or asks for other arithmetic.
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
    """The image processor's settings: transformers 5 nests them, and prefers them nested."""
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
        raise fields.error(key, f"{values!r}", "three numbers, for red, green and blue")
    return numbers[0], numbers[1], numbers[2]


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 [1, 3, H, W] to [1, 3, height, width]."""
    if pixels.shape[2:] == (height, width):
        return pixels
    return torch.nn.functional.interpolate(
        pixels, (height, width), mode="bilinear", antialias=True, align_corners=False
    )


def _table(tiling: Tiling) -> Tensor:
    """float32 [3, 256]: what each level of each channel becomes; each step rounds to bfloat16."""
    levels = torch.arange(256).to(torch.bfloat16) * tiling.rescale
    mean, std = (
        torch.tensor(three, dtype=torch.bfloat16)[:, None] for three in (tiling.mean, tiling.std)
    )
    return ((levels - mean) / std).float()
