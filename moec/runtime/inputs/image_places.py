"""Images of a prompt: the marks for them in its text, their tiles, and the tokens between."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from moec.runtime.inputs.image import read_image
from moec.runtime.inputs.text import Text
from moec.runtime.inputs.tiling import read_tiling, tile
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec

Source = str | Path | bytes | Image
Images = Source | Iterable[Source]

#: special tokens of the published tokenizer; in a prompt, IMAGE also marks the place of an image
START, IMAGE, PATCH, END = "<|image_start|>", "<|image|>", "<|patch|>", "<|image_end|>"
COLUMN, ROW = "<|tile_x_separator|>", "<|tile_y_separator|>"
IMAGE_TOKENS = (START, IMAGE, PATCH, END, COLUMN, ROW)


def listed(images: Images) -> list[Source]:
    """One or several images, as a list.

    Raises:
        MoecError: it is neither.
    """
    if isinstance(images, str | Path | bytes | Image):
        return [images]
    if not isinstance(images, Iterable):
        expected = "an image, or a list of images: paths, bytes or Pillow images"
        refuse("images", f"{type(images).__name__}", expected, "give () where there are none")
    return list(images)


def check_marks(text: str, images: int) -> None:
    """Refuse a text that marks another number of `images` than there are.

    Raises:
        MoecError: the message has both numbers.
    """
    marks = text.count(IMAGE)
    if marks != images:
        refuse(
            "prompt",
            f"{marks} {IMAGE} in the text, {images} images",
            f"one {IMAGE} for each image, or none",
            "give as many images as the text marks",
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """Images as tiles.

    `tiles` is float32 [tiles, channels, height, width], or None without images. The rest is as in
    `Prompt`.
    """

    tiles: Tensor | None
    grids: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]


def cut_images(words: Text, spec: ModelSpec, images: Sequence[Source]) -> Cut:
    """Read images, and cut them into tiles.

    Raises:
        MoecError: the model has no vision tower, its tokenizer lacks tokens of images, or an image
            cannot be read.
    """
    if not images:
        return Cut(None, (), ())
    if spec.vision is None:
        refuse(
            "images",
            f"{spec.name} has no vision tower",
            "a model with a vision tower, or no images",
            "leave the images out",
        )
    _check_tokens(words, spec)
    tiling, notes = read_tiling(words.find, spec.vision.image), []
    if not _is_tiled(words):
        tiling = replace(tiling, most=1)
        notes.append(
            f"The tokenizer has no {IMAGE}, {COLUMN} and {ROW}: each image goes in as one tile."
        )
    tiles, grids = zip(*(tile(read_image(image), tiling) for image in images), strict=True)
    return Cut(torch.cat(tiles), grids, tuple(notes))


def place(
    words: Text,
    spec: ModelSpec,
    text: str,
    ids: Callable[[str], list[int]],
    grids: Sequence[tuple[int, int]],
) -> list[int]:
    """The token ids of `text`, whose marks stand for images that were cut into `grids`.

    `ids` turns a text with the tokens of images into token ids.

    Raises:
        MoecError: the text has image tokens that no image gives, or the tokenizer drops some.
    """
    if not grids:
        return ids(text)
    assert spec.vision is not None
    tiled = _is_tiled(words)
    first, *rest = text.split(IMAGE)
    shown = [layout(grid, spec.vision.tokens, tiled) for grid in grids]
    row = ids(first + "".join(map("".join, zip(shown, rest, strict=True))))
    assert spec.tokens.image is not None  # a spec with a vision tower has this token
    found, expected = row.count(spec.tokens.image), sum(map(tiles_in, grids)) * spec.vision.tokens
    if found != expected:
        more = found > expected
        refuse(
            "prompt",
            f"{found} {PATCH} tokens",
            f"{expected} {PATCH} tokens, all of them from the images",
            f"leave {PATCH} out of the text" if more else "use a tokenizer that keeps them all",
        )
    return row


def tiles_in(grid: tuple[int, int]) -> int:
    """The tiles of an image that was cut into `grid`: with the global one, if there are several."""
    rows, columns = grid
    return rows * columns + (rows * columns > 1)


def _is_tiled(words: Text) -> bool:
    """Whether the tokenizer has what separates the tiles of an image."""
    return all(map(words.has, (IMAGE, COLUMN, ROW)))


def layout(grid: tuple[int, int], tokens: int, tiled: bool = True) -> str:
    """The special tokens of one image, as text.

    The image has `grid` (rows, columns) tiles of `tokens` tokens each. For tokenizers without
    separators, `tiled` is False; the image is then a single tile between start and end tokens.
    """
    rows, columns = grid
    patches = PATCH * tokens
    if not tiled:
        return f"{START}{patches}{END}"
    canvas = "".join(COLUMN.join([patches] * columns) + ROW for _ in range(rows))
    return f"{START}{canvas if rows * columns > 1 else ''}{IMAGE}{patches}{END}"


def _check_tokens(words: Text, spec: ModelSpec) -> None:
    missing = [token for token in (START, PATCH, END) if not words.has(token)]
    number = words.tokenizer.token_to_id(PATCH)
    if missing or number != spec.tokens.image:
        refuse(
            "tokenizer.json",
            f"no {missing[0]}" if missing else f"{PATCH} is token {number}",
            f"{START}, {END}, and {PATCH} as token {spec.tokens.image}, as config.json says",
            "use the tokenizer of the checkpoint",
        )
