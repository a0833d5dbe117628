"""Messages of a conversation, and text in them that spells a special token.

A chat template makes one text of its own special tokens and of what people wrote. If somebody
writes "<|eot|>", the tokenizer would take it for the token, and a message could pretend to be the
system's. So `guarded` breaks such text with a marker, and `split` tells both apart again.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from moec.spec.bounded.limits import JSON
from moec.spec.bounded.own import own_file
from moec.spec.bounded.read import parse_json, read_bytes
from moec.spec.errors import refuse

Message = Mapping[str, Any]
#: characters that Unicode keeps free for such uses; the first that no message has is the marker
_MARKERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
#: whose text may have special tokens: the model wrote it
MODEL = "assistant"
#: where a part {"type": "image"} may have its image
_SOURCES = ("path", "image")
#: the names under which messages hold the model's reasoning
_REASONING = ("reasoning_content", "thinking", "reasoning")
#: whose text a template may put side by side
_SPOKEN = ("content", "text")


def checked(messages: object, where: str = "messages") -> list[dict[str, Any]]:
    """Messages as a list of dicts, each with a "role", and with a "content" or tool calls.

    A content is text, or a list of parts such as {"type": "text", "text": ...} and
    {"type": "image"}.

    Raises:
        MoecError: names the first message that is none.
    """
    expected = 'a list of {"role": ..., "content": ...}, the content a text or a list of parts'
    if not isinstance(messages, list | tuple) or not messages:
        _refuse(where, messages, expected)
    for number, message in enumerate(messages):
        at = f"{where}[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            _refuse(at, message, expected)
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list | None) or not all(
            isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in parts
        ):
            _refuse(f"{at}.content", content, expected)
        if content is None and not message.get("tool_calls"):
            _refuse(at, message, expected)
    return [_as_templates_know(message) for message in messages]


def _as_templates_know(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it to a template.

    A key without a value is none, as in {"content": null, "tool_calls": [...]}. Templates look for
    the reasoning under one of two names.
    """
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    if reasoning is None:
        return found
    return {"thinking": reasoning, **found, "reasoning_content": reasoning}


def checked_tools(tools: object, where: str = "tools") -> list[dict[str, Any]] | None:
    """Tools that a model may call as a list of dicts; None if there are none.

    Raises:
        MoecError: they are no list of objects.
    """
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(each, Mapping) for each in tools):
        _refuse(where, tools, "a list of objects that each describe a tool")
    return [dict(each) for each in tools]


def check_json(messages: object, where: str = "messages") -> None:
    """Refuse messages or tools with a value that a chat template cannot be given.

    Raises:
        MoecError: a value is nothing that JSON holds, such as bytes.
    """
    try:
        json.dumps(messages)
    except (TypeError, ValueError) as error:
        expected = "text, numbers, lists, objects, true, false and null"
        refuse(where, error, expected, "correct the messages")


def read_messages(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Read messages and tools from a JSON file: a list of messages, or an object with both.

    The files of images that the messages name lie in the file's folder.

    Raises:
        MoecError: the file cannot be read, is too large, or holds something else; or an image is
            outside the folder.
    """
    again = "correct the file"
    raw = read_bytes(path, JSON.bytes, "a file of messages", again)
    try:
        found = parse_json(raw, path, JSON, again)
    except ValueError as error:
        refuse(path, f"broken JSON: {error}", "messages as JSON in UTF-8", again)
    if not isinstance(found, dict):
        return _with_files(checked(found, str(path)), path.parent), None
    if set(found) - {"messages", "tools"}:
        _refuse(str(path), found, 'a list of messages, or {"messages": [...], "tools": [...]}')
    tools = checked_tools(found.get("tools"), f"{path}: tools")
    messages = checked(found.get("messages"), f"{path}: messages")
    return _with_files(messages, path.parent), tools


def _with_files(messages: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The messages with the real paths of the images in `folder` that they name."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            for name in _SOURCES if part["type"] == "image" else ():
                given = part.get(name)
                if isinstance(given, str):
                    next_step = f"put the image into {folder}, or give it with --image"
                    part[name] = own_file(folder / given, folder, next_step)
                elif given is not None:
                    _refuse(f'an image\'s "{name}"', given, "the name of a file")
    return messages


def pictures(
    messages: Sequence[Message], images: Iterable[Any]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages without their images, and all images in the order of the messages.

    Parts that have no image of their own take one of `images` each. A part names no file as text,
    because whoever wrote the messages could then name any file of this user.

    Raises:
        MoecError: an image of a part is text.
    """
    given, found = iter(images), list[Any]()

    def without(part: Any) -> Any:
        if not isinstance(part, Mapping) or part.get("type") != "image":
            return part
        own = [part[name] for name in _SOURCES if part.get(name) is not None][:1]
        if own and isinstance(own[0], str):
            _refuse("an image of a message", own[0], "a pathlib.Path, bytes or a Pillow image")
        found.extend(own or islice(given, 1))
        return {key: value for key, value in part.items() if key not in _SOURCES}

    bare = [
        {**each, "content": [without(part) for part in each["content"]]}
        if isinstance(each.get("content"), list)
        else dict(each)
        for each in messages
    ]
    return bare, [*found, *given]


def _refuse(where: str, found: object, expected: str) -> NoReturn:
    refuse(where, repr(found)[:200], expected, "correct the messages")


def guarded(
    messages: Sequence[Message],
    special: Iterable[str],
    nobodys: Iterable[str] = (),
    kept: Iterable[str] = (),
    plain: Collection[int] = (),
) -> tuple[list[dict[str, Any]], str]:
    """Break special tokens in the text of all but the model; return the messages and the marker.

    Tokens `nobodys` are broken in text of the model too, and all tokens in the messages of the
    numbers `plain`; `kept` stay as they are. The marker is "" if there was nothing to break.

    Raises:
        MoecError: the messages hold all characters that could be the marker.
    """
    text = "".join(texts(messages))
    marker = next((each for each in _MARKERS if each not in text), None)
    if marker is None:
        refuse("messages", "all of U+FDD0 to U+FDEF", "text without them", "correct the messages")
    breaks = {
        True: _breaks(set(nobodys) - set(kept), marker),
        False: _breaks({*special, *nobodys} - set(kept), marker),
    }
    own = [each["role"] == MODEL and number not in plain for number, each in enumerate(messages)]
    found: list[dict[str, Any]] = [
        _each(each, breaks[tokens]) for each, tokens in zip(messages, own, strict=True)
    ]
    said = list(_spoken([each for each, tokens in zip(found, own, strict=True) if not tokens]))
    joined = "".join(said), "".join(each.strip() for each in said)
    if any(token in each for token in {*special, *nobodys} - set(kept) for each in joined):
        # The pieces of a token are in several texts: each of these ends with a marker.
        found = [
            each if tokens else _closed(each, marker)
            for each, tokens in zip(found, own, strict=True)
        ]
    return found, marker if found != [dict(each) for each in messages] else ""


def split(text: str, special: Iterable[str], marker: str) -> list[tuple[bool, str]]:
    """The special tokens in a filled template, and the text between them: (is a token, text)."""
    tokens = sorted(special, key=len, reverse=True)
    if not tokens:
        return [(False, text.replace(marker, ""))]
    parts = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
    found = [(index % 2 == 1, part.replace(marker, "")) for index, part in enumerate(parts)]
    return [(token, part) for token, part in found if part]


def texts(value: object) -> Iterator[str]:
    """All text in a value that JSON can hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts(each)


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with all text in it changed, but for keys that are names, which templates look up."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_key(key, change): _each(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_each(inner, change) for inner in value]
    return value


def _key(key: Any, change: Callable[[str], str]) -> Any:
    return change(key) if isinstance(key, str) and not key.isidentifier() else key


def _spoken(value: Any) -> Iterator[str]:
    """The text of messages in its order: contents, and the text of their parts."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, str) and key in _SPOKEN:
                yield inner
            else:
                yield from _spoken(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _spoken(inner)


def _closed(value: Any, marker: str) -> Any:
    """`value` with the marker after each text of `_spoken`, before the spaces at its end."""
    if isinstance(value, Mapping):
        return {
            key: _ended(inner, marker)
            if isinstance(inner, str) and key in _SPOKEN
            else _closed(inner, marker)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_closed(inner, marker) for inner in value]
    return value


def _ended(text: str, marker: str) -> str:
    end = len(text.rstrip())
    return text[:end] + marker + text[end:]


def _breaks(special: Iterable[str], marker: str) -> Callable[[str], str]:
    """A function that puts `marker` into each special token of a text.

    Also into the end of a token at the start of the text, and into the start of a token at its end:
    the template could complete it. A token of one character cannot be broken.
    """
    tokens = sorted((each for each in special if len(each) > 1), key=len, reverse=True)
    if not tokens:
        return lambda text: text
    whole = re.compile("|".join(map(re.escape, tokens)))

    def change(text: str) -> str:
        text = whole.sub(lambda found: found[0][0] + marker + found[0][1:], text)
        bare = text.lstrip()
        if any(_meet(token, bare, min(len(bare), len(token) - 1)) for token in tokens):
            at = len(text) - len(bare) + 1
            text = text[:at] + marker + text[at:]
        bare = text.rstrip()
        if any(_meet(bare, token, len(token) - 1) for token in tokens):
            at = len(bare) - 1
            text = text[:at] + marker + text[at:]
        return text

    return change


def _meet(first: str, second: str, longest: int) -> bool:
    """Whether the end of one text is the start of another: 2 to `longest` characters."""
    start, at = second[:2], max(0, len(first) - longest)
    while len(start) == 2 and (at := first.find(start, at)) >= 0:
        if second.startswith(first[at:]):
            return True
        at += 1
    return False
