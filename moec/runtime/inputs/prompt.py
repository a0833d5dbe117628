"""Turn a prompt of text and images into token ids and image tiles."""

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

#: special tokens of the published tokenizer; in a prompt, IMAGE also marks the place of an image
START, IMAGE, PATCH, END = "<|image_start|>", "<|image|>", "<|patch|>", "<|image_end|>"
COLUMN, ROW = "<|tile_x_separator|>", "<|tile_y_separator|>"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for `Session.generate`: `session.generate(prompt.input_ids, prompt.pixel_values)`.

    `input_ids` are the token ids. `pixel_values` is float32 [tiles, channels, height, width], or
    None without images. `grids` has the rows and columns of tiles of each image; an image of more
    than one tile also has a global tile. `notes` tells the user about limits of the tokenizer.
    """

    input_ids: list[int]
    pixel_values: Tensor | None
    grids: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]


def encode(
    path: str | Path,
    text: str,
    images: Images = (),
    *,
    chat: bool = False,
    weights_from: str | Path | None = None,
) -> Prompt:
    """Turn `text` and `images` into token ids and image tiles.

    Args:
        path: the folder of an artefact or of a checkpoint.
        text: the prompt. `<|image|>` marks the place of each image; without marks, images come
            first.
        images: one or several image files, their bytes, or Pillow images.
        chat: put the text into the checkpoint's chat template, as a message of the user.
        weights_from: the folder of the weights, as in `open_session`.

    Raises:
        MoecError: there is no tokenizer, or it has no image tokens; an image cannot be read; the
            text marks another number of images; or the model has no vision tower for images.
    """
    path = Path(path)
    if not (path / NAME).is_file() and (path / "config.json").is_file():
        return compose(open_text(path), load_spec(path), text, images, chat)
    artefact = open_artefact(path, weights_from)
    return compose(open_text(artefact), artefact.manifest.spec, text, images, chat)


def compose(
    words: Text, spec: ModelSpec, text: str, images: Images = (), chat: bool = False
) -> Prompt:
    """Like `encode`, with an open tokenizer and the model's spec."""
    _check_unicode(text)
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
            f"one {IMAGE} for each image, or none",
            "give as many images as the text marks",
        )
    if not images:
        return Prompt(words.encode(text), None, (), ())
    if spec.vision is None:
        refuse(
            "images",
            f"{spec.name} has no vision tower",
            "a model with a vision tower, or no images",
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
    assert spec.tokens.image is not None  # a spec with a vision tower has this token
    found, expected = ids.count(spec.tokens.image), len(pixels) * spec.vision.tokens
    if found != expected:
        more = found > expected
        refuse(
            "prompt",
            f"{found} {PATCH} tokens",
            f"{expected} {PATCH} tokens, all of them from the images",
            f"leave {PATCH} out of the text" if more else "use a tokenizer that keeps them all",
        )
    return Prompt(ids, pixels, grids, tuple(notes))


def _check_unicode(text: str) -> None:
    """Refuse lone surrogates: half of a character, or what Python makes of bytes that are no UTF-8.

    Raises:
        MoecError: names the first one.
    """
    lone = next((i for i, each in enumerate(text) if "\ud800" <= each <= "\udfff"), None)
    if lone is not None:
        refuse(
            "prompt",
            f"character {lone + 1} is a lone surrogate, U+{ord(text[lone]):04X}",
            "text that UTF-8 can hold",
            "save the text as UTF-8, or repair what cut it",
        )


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
