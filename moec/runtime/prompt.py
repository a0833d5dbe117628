"""A prompt of text and images: token ids, and the tiles that its image tokens stand for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moec.exporters.artefact import Artefact, open_artefact
from moec.runtime.image import read_image
from moec.runtime.text import Text, open_text
from moec.runtime.tiling import read_tiling, tile
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image

#: special tokens of the published tokenizer; IMAGE also marks, in a prompt, where an image belongs
START, IMAGE, PATCH, END = "<|image_start|>", "<|image|>", "<|patch|>", "<|image_end|>"
COLUMN, ROW = "<|tile_x_separator|>", "<|tile_y_separator|>"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What `Session.generate` takes: `session.generate(prompt.input_ids, prompt.pixel_values)`.

    `pixel_values` is float32 [tiles, channels, height, width], None without images. `grids` holds
    rows and columns of tiles, one pair for each image; an image of several also has a global tile.
    """

    input_ids: list[int]
    pixel_values: Tensor | None
    grids: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]


def encode(
    path: str | Path,
    text: str,
    images: "Sequence[str | Path | bytes | Image]" = (),
    chat: bool = False,
) -> Prompt:
    """Tokens and tiles of `text` and `images` for the artefact in `path`.

    Args:
        text: `<|image|>` marks where each image belongs; without any they come first.
        images: files, their bytes, or Pillow images.
        chat: wrap the text as a user's message in the checkpoint's chat template.

    Raises:
        MoecError: no tokenizer, or one without image tokens; an image that cannot be read; a text
            that marks another number of images; images for a model without a vision tower.
    """
    artefact = open_artefact(path)
    return compose(artefact, open_text(artefact), text, images, chat)


def compose(
    artefact: Artefact,
    words: Text,
    text: str,
    images: "Sequence[str | Path | bytes | Image]" = (),
    chat: bool = False,
) -> Prompt:
    """`encode` for an artefact that is open, `words` its tokenizer."""
    spec = artefact.manifest.spec
    if not images:
        return Prompt(words.chat(text) if chat else words.encode(text), None, (), ())
    if spec.vision is None:
        raise MoecError(
            "images", f"{spec.name} has no vision tower", "a model with one, or no images",
            "leave --image out",
        )  # fmt: skip
    tiled = _check_tokens(words, spec)
    tiling = read_tiling(artefact.companion, spec.vision.image)
    notes = []
    if not tiled:
        tiling = replace(tiling, most=1)
        notes.append(
            f"The tokenizer has no {IMAGE}, {COLUMN} and {ROW}: each image goes in as one tile."
        )
    text = text if IMAGE in text else IMAGE * len(images) + text
    if chat:
        text = words.render(text)
    marks = text.count(IMAGE)
    if marks != len(images):
        raise MoecError(
            "prompt", f"{marks} {IMAGE} in the text, {len(images)} images",
            "one for each image, or none", "add the missing --image, or leave the marks out",
        )  # fmt: skip
    tiles, grids = zip(*(tile(read_image(image), tiling) for image in images), strict=True)
    parts = text.split(IMAGE)
    shown = [layout(grid, spec.vision.tokens, tiled) for grid in grids]
    text = parts[0] + "".join(map("".join, zip(shown, parts[1:], strict=True)))
    ids, pixels = words.encode(text), torch.cat(tiles)
    assert spec.tokens.image is not None  # a spec with a tower has one
    found, expected = ids.count(spec.tokens.image), len(pixels) * spec.vision.tokens
    if found != expected:
        raise MoecError(
            "prompt", f"{found} {PATCH} tokens", f"{expected}, those of the images alone",
            f"leave {PATCH} out of the text",
        )  # fmt: skip
    return Prompt(ids, pixels, grids, tuple(notes))


def layout(grid: tuple[int, int], tokens: int, tiled: bool = True) -> str:
    """The special tokens of one image of `grid` (rows, columns) tiles, `tokens` to a tile.

    Without `tiled`, for tokenizers that have no separators, a single tile between start and end.
    """
    rows, columns = grid
    patches = PATCH * tokens
    if not tiled:
        return f"{START}{patches}{END}"
    canvas = "".join(COLUMN.join([patches] * columns) + ROW for _ in range(rows))
    return f"{START}{canvas if rows * columns > 1 else ''}{IMAGE}{patches}{END}"


def _check_tokens(words: Text, spec: ModelSpec) -> bool:
    """Refuse a tokenizer without image tokens; True if it can say several tiles."""
    ids = {token: words.tokenizer.token_to_id(token) for token in (START, PATCH, END)}
    missing = [token for token, number in ids.items() if number is None]
    if missing or ids[PATCH] != spec.tokens.image:
        raise MoecError(
            "tokenizer.json",
            f"no {missing[0]}" if missing else f"{PATCH} is token {ids[PATCH]}",
            f"{START}, {END}, and {PATCH} as token {spec.tokens.image}, as config.json says",
            "use the tokenizer of the checkpoint",
        )
    return all(words.tokenizer.token_to_id(token) is not None for token in (IMAGE, COLUMN, ROW))
