"""A prompt of text and images: token ids, and the tiles that its image tokens stand for."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from moec.artefact.artefact import open_artefact
from moec.artefact.manifest import NAME
from moec.runtime.inputs.image import read_image
from moec.runtime.inputs.text import Text, open_text
from moec.runtime.inputs.tiling import read_tiling, tile
from moec.spec.errors import refuse
from moec.spec.files import load_spec
from moec.spec.model import ModelSpec

Source = str | Path | bytes | Image
Images = Source | Iterable[Source]

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


def encode(path: str | Path, text: str, images: Images = (), chat: bool = False) -> Prompt:
    """Tokens and tiles of `text` and `images` for the artefact or checkpoint folder in `path`.

    Args:
        text: `<|image|>` marks where each image belongs; without any they come first.
        images: one or several files, their bytes, or Pillow images.
        chat: wrap the text as a user's message in the checkpoint's chat template.

    Raises:
        MoecError: no tokenizer, or one without image tokens; an image that cannot be read; a text
            that marks another number of images; images for a model without a vision tower.
    """
    path = Path(path)
    if not (path / NAME).is_file() and (path / "config.json").is_file():
        return compose(open_text(path), load_spec(path), text, images, chat)
    artefact = open_artefact(path)
    return compose(open_text(artefact), artefact.manifest.spec, text, images, chat)


def compose(
    words: Text, spec: ModelSpec, text: str, images: Images = (), chat: bool = False
) -> Prompt:
    """`encode` for a tokenizer that is open, and the model's spec."""
    images = [images] if isinstance(images, str | Path | bytes | Image) else list(images)
    if images and IMAGE not in text:
        text = IMAGE * len(images) + text
    if chat:
        text = words.render(text)
    marks = text.count(IMAGE)
    if marks != len(images):
        refuse(
            "prompt",
            f"{marks} {IMAGE} in the text, {len(images)} images",
            "one for each image, or none",
            "give as many images as the text marks",
        )
    if not images:
        return Prompt(words.encode(text), None, (), ())
    if spec.vision is None:
        refuse(
            "images",
            f"{spec.name} has no vision tower",
            "a model with one, or no images",
            "leave the images out",
        )
    _check_tokens(words, spec)
    tiling, notes = read_tiling(words.find, spec.vision.image), []
    tiled = all(map(words.has, (IMAGE, COLUMN, ROW)))
    if not tiled:
        tiling = replace(tiling, most=1)
        notes.append(
            f"The tokenizer has no {IMAGE}, {COLUMN} and {ROW}: each image goes in as one tile."
        )
    tiles, grids = zip(*(tile(read_image(image), tiling) for image in images), strict=True)
    first, *rest = text.split(IMAGE)
    shown = [layout(grid, spec.vision.tokens, tiled) for grid in grids]
    ids = words.encode(first + "".join(map("".join, zip(shown, rest, strict=True))))
    pixels = torch.cat(tiles)
    assert spec.tokens.image is not None  # a spec with a tower has one
    found, expected = ids.count(spec.tokens.image), len(pixels) * spec.vision.tokens
    if found != expected:
        more = found > expected
        refuse(
            "prompt",
            f"{found} {PATCH} tokens",
            f"{expected}, those of the images alone",
            f"leave {PATCH} out of the text" if more else "use a tokenizer that keeps them all",
        )
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
