"""Turn a prompt of text and images into token ids and image tiles."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moec.artefact.artefact import open_artefact
from moec.artefact.manifest import NAME
from moec.runtime.inputs.chat import (
    Message,
    check_json,
    checked,
    checked_tools,
    pictures,
    texts,
)
from moec.runtime.inputs.image_places import (
    IMAGE,
    IMAGE_TOKENS,
    Images,
    check_marks,
    cut_images,
    listed,
    place,
)
from moec.runtime.inputs.text import Text, open_text
from moec.spec.errors import refuse
from moec.spec.files import read_spec
from moec.spec.hf.forms import checkpoint_folder
from moec.spec.model import ModelSpec


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

    In a chat template, text of messages and tools that spells a special token is text.

    Args:
        path: the folder of an artefact or of a checkpoint.
        text: the prompt, or the messages of a conversation, [{"role": ..., "content": ...}], which
            go into the checkpoint's chat template. In a prompt `<|image|>` marks the place of each
            image; without marks, images come first. In messages a part {"type": "image"} does; it
            may have its image as "path" or "image": a `Path`, bytes or a Pillow image.
        images: one or several image files, their bytes, or Pillow images: those that no part has.
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
    folder = checkpoint_folder(path)
    if folder and not (folder / NAME).is_file() and (folder / "config.json").is_file():
        return compose(open_text(path), read_spec(path), text, images, chat, tools, system)
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
    shown = listed(images)
    ids: Callable[[str], list[int]]
    if isinstance(text, str):
        _check_unicode(text)
        if shown and IMAGE not in text:
            text = IMAGE * len(shown) + text
    if chat or system is not None or not isinstance(text, str):
        messages, kept = text, []
        if isinstance(text, str):
            messages, kept = [{"role": "user", "content": text}], [IMAGE] if shown else []
        first = [] if system is None else checked([{"role": "system", "content": system}])
        messages, shown = pictures([*first, *checked(messages)], shown)
        text, ids = filled(words, messages, tools, kept=kept)
    else:
        ids = words.encode
    check_marks(text, len(shown))
    cut = cut_images(words, spec, shown)
    return Prompt(place(words, spec, text, ids, cut.grids), cut.tiles, cut.grids, cut.notes)


def filled(
    words: Text,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    plain: Collection[int] = (),
    kept: Sequence[str] = (),
) -> tuple[str, Callable[[str], list[int]]]:
    """The chat template with `messages` in it, and what turns such a text into token ids.

    Text of the model may have special tokens, but for the messages of the numbers `plain`. `kept`
    are the tokens that everybody's text may have.
    """
    tools = checked_tools(tools)
    for each in texts([*messages, *(tools or ())]):
        _check_unicode(each)
    for where, values in (("messages", messages), ("tools", tools)):
        check_json(values, where)
    special = words.tokenizer.special(words.templates.values())
    said = [*messages, {"role": "tools", "tools": tools}]
    (*messages, held), marker = words.tokenizer.guard(
        said, special=special, nobodys=IMAGE_TOKENS, kept=kept, plain=plain
    )
    text = words.render(messages, held["tools"])
    if not marker and not words.tokenizer.normalises():
        return text, words.tokenizer.encode_filled
    return text, lambda text: words.tokenizer.encode_split(text, special, marker)


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
