"""Turn a prompt of text and images into token ids and image tiles."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from moec.artefact.artefact import open_artefact
from moec.artefact.manifest import NAME
from moec.runtime.inputs.chat import Message, checked, guarded, split, texts
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
IMAGE_TOKENS = (START, IMAGE, PATCH, END, COLUMN, ROW)


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
    text: str | Sequence[Message],
    images: Images = (),
    *,
    chat: bool = False,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    weights_from: str | Path | None = None,
) -> Prompt:
    """Turn `text` and `images` into token ids and image tiles.

    In a chat template, text of messages that spells a special token is text.

    Args:
        path: the folder of an artefact or of a checkpoint.
        text: the prompt, or the messages of a conversation, [{"role": ..., "content": ...}], which
            go into the checkpoint's chat template. In a prompt `<|image|>` marks the place of each
            image; without marks, images come first. In messages a part {"type": "image"} does.
        images: one or several image files, their bytes, or Pillow images.
        chat: put the prompt into the chat template, as a message of the user.
        system: a system message before the prompt, which goes into the chat template then.
        tools: the tools that the model may call, in the form that the chat template takes.
        weights_from: the folder of the weights, as in `open_session`.

    Raises:
        MoecError: there is no tokenizer or chat template, or it has no image tokens; an image
            cannot be read; the text marks another number of images; or the model has no vision
            tower for images.
    """
    path = Path(path)
    if not (path / NAME).is_file() and (path / "config.json").is_file():
        return compose(open_text(path), load_spec(path), text, images, chat, tools, system)
    artefact = open_artefact(path, weights_from)
    return compose(open_text(artefact), artefact.manifest.spec, text, images, chat, tools, system)


def compose(
    words: Text,
    spec: ModelSpec,
    text: str | Sequence[Message],
    images: Images = (),
    chat: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    system: str | None = None,
) -> Prompt:
    """Like `encode`, with an open tokenizer and the model's spec."""
    images = [images] if isinstance(images, str | Path | bytes | Image) else list(images)
    ids: Callable[[str], list[int]]
    if isinstance(text, str):
        _check_unicode(text)
        if images and IMAGE not in text:
            text = IMAGE * len(images) + text
    if chat or system is not None or not isinstance(text, str):
        text, ids = _filled(words, text, bool(images), tools, system)
    else:
        ids = words.encode
    marks = text.count(IMAGE)
    if marks != len(images):
        refuse(
            "prompt",
            f"{marks} {IMAGE} in the text, {len(images)} images",
            f"one {IMAGE} for each image, or none",
            "give as many images as the text marks",
        )
    if not images:
        return Prompt(ids(text), None, (), ())
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
    row = ids(first + "".join(map("".join, zip(shown, rest, strict=True))))
    pixels = torch.cat(tiles)
    assert spec.tokens.image is not None  # a spec with a vision tower has this token
    found, expected = row.count(spec.tokens.image), len(pixels) * spec.vision.tokens
    if found != expected:
        more = found > expected
        refuse(
            "prompt",
            f"{found} {PATCH} tokens",
            f"{expected} {PATCH} tokens, all of them from the images",
            f"leave {PATCH} out of the text" if more else "use a tokenizer that keeps them all",
        )
    return Prompt(row, pixels, grids, tuple(notes))


def _filled(
    words: Text,
    text: str | Sequence[Message],
    images: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    system: str | None,
) -> tuple[str, Callable[[str], list[int]]]:
    """The chat template with `text` in it, and what turns such a text into token ids.

    `IMAGE` in a prompt marks an image if there are `images`, and is text without them.
    """
    prompt = isinstance(text, str)
    messages = checked([{"role": "user", "content": text}] if prompt else text)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    for each in texts(messages):
        _check_unicode(each)
    special = words.tokenizer.special()
    kept = [IMAGE] if prompt and images else []
    messages, marker = guarded(messages, special, IMAGE_TOKENS, kept)
    filled = words.render(messages, tools)
    if not marker:
        return filled, words.tokenizer.encode_filled
    return filled, lambda text: words.tokenizer.encode_parts(split(text, special, marker))


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
