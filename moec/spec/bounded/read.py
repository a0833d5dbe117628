"""Open and read files from outside: regular files only, of a bounded size and structure.

Everything that moec reads and did not write itself in the same run comes through here.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

import yaml

from moec.spec.bounded.limits import DIGITS, JSON, YAML, Text
from moec.spec.errors import refuse

_AGAIN = "download the file again"

#: how the small file begins that Git LFS puts in the place of a large one
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_MOST = 1024


def open_file(
    path: Path,
    most: int | None = None,
    what: str = "a file",
    next_step: str = "check the path",
    where: object = None,
) -> BinaryIO:
    """Open the regular file `path` to read its bytes.

    A pipe or a device is refused, because opening or reading it may never end. The check of the
    open file makes sure that nobody has put another one in its place.

    Args:
        path: the file.
        most: the most bytes that it may have.
        what: what is expected there, for the message.
        next_step: what the user can do about it.
        where: what the message calls the file; by default its path.

    Raises:
        MoecError: there is no such file, it is not a regular file, it is too large, or Git LFS has
            put it there for a file that was not downloaded.
    """
    found: object
    where = where or path
    try:
        kind = _kind(os.stat(path))
        if kind is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            file = os.fdopen(descriptor, "rb")
            status = os.fstat(descriptor)
            kind = _kind(status)
            if kind is None:
                if status.st_size < _POINTER_MOST:
                    _refuse_pointer(path, file)
                if most is None or status.st_size <= most:
                    return file
                size = status.st_size
                file.close()
                refuse(where, f"{size:,} bytes", f"{what} of at most {most:,} bytes", next_step)
            file.close()
        found = kind
    except OSError as error:
        found = error.strerror or error
    except ValueError as error:  # a zero byte in the name
        found = error
    refuse(where, found, what, next_step)


def _refuse_pointer(path: Path, file: BinaryIO) -> None:
    if file.read(len(_POINTER)) == _POINTER:
        file.close()
        refuse(
            path,
            "a Git LFS pointer, which stands for a file that was not downloaded",
            "the file itself",
            f"git -C {quote(str(path.parent))} lfs pull",
        )
    file.seek(0)


def _kind(status: os.stat_result) -> str | None:
    """What is there instead of a regular file; None for a regular file."""
    if stat.S_ISREG(status.st_mode):
        return None
    return "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"


def read_bytes(
    path: Path, most: int, what: str = "a file", next_step: str = "check the path"
) -> bytes:
    """Read the regular file `path` of at most `most` bytes; see `open_file`.

    Raises:
        MoecError: there is no such file, it is too large, or it cannot be read.
    """
    with open_file(path, most, what, next_step) as file:
        try:
            raw = file.read(most + 1)  # a file in /proc says that it has 0 bytes
        except OSError as error:
            refuse(path, error.strerror or error, what, next_step)
    if len(raw) > most:
        refuse(path, f"over {most:,} bytes", f"{what} of at most {most:,} bytes", next_step)
    return raw


def parse_json(raw: bytes, where: object, limits: Text = JSON, next_step: str = _AGAIN) -> Any:
    """Parse JSON text whose size, number of values and nesting are within `limits`.

    A key that an object has twice is refused, because programs disagree on which one counts. So is
    half of a character, which no file in UTF-8 can hold.

    Raises:
        ValueError: the text is no JSON, or not UTF-8.
        MoecError: the text is above a limit.
    """
    check_json(raw, where, limits, next_step)
    _check_pairs(raw)
    return json.loads(raw.decode("utf-8"), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} is there twice in one object")
    return found


#: a backslash, a character of two halves, or one half
_HALVES = re.compile(
    rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)


def _check_pairs(raw: bytes) -> None:
    r"""Refuse an escape in JSON that is half of a character, such as \ud800 alone."""
    for found in _HALVES.finditer(raw) if b"\\u" in raw else ():
        if found[1]:
            lone = found[1].decode()
            raise ValueError(f"lone surrogate {lone} at byte {found.start()}: half of a character")


_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def check_json(raw: bytes, where: object, limits: Text, next_step: str = _AGAIN) -> None:
    """Refuse JSON text that is above `limits`, without building its values.

    Up to the first error in the text, the counts are exact.

    Raises:
        MoecError: the text is above a limit.
    """
    if len(raw) > limits.bytes:
        _too_much(where, f"{len(raw):,} bytes", f"at most {limits.bytes:,} bytes", next_step)
    bare = re.sub(rb'"[^"]*"?', b"", raw.replace(rb"\\", b"").replace(rb"\"", b""))
    items = bare.count(b",") + bare.count(b"[") + bare.count(b"{")
    if items > limits.items:
        _too_much(where, f"{items:,} values", f"at most {limits.items:,} values", next_step)
    if re.search(rb"\d{%d}" % (DIGITS + 1), bare):
        found = f"a number of over {DIGITS} digits"
        _too_much(where, found, f"numbers of at most {DIGITS} digits", next_step)
    brackets = bare.translate(None, _BRACKETS)
    for _ in range(limits.depth):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    if len(brackets) > limits.depth:
        found = f"lists or objects in over {limits.depth} levels, or unbalanced brackets"
        _too_much(where, found, f"at most {limits.depth} levels", next_step)


def _too_much(where: object, found: str, expected: str, next_step: str) -> None:
    refuse(where, found, f"{expected}, which is far above what any model needs", next_step)


# libyaml's parser is ten times as fast as PyYAML's own; the Linux wheels have it.
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_YAML):  # type: ignore[misc]
    """PyYAML's safe loader, without numbers that take quadratic time."""

    def short(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > DIGITS:
            raise yaml.YAMLError(f"a number or date of over {DIGITS} characters")
        return _YAML.yaml_constructors[node.tag](self, node)


for _tag in ("int", "float", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.short)


_LONE = re.compile("[\ud800-\udfff]")


def parse_yaml(raw: bytes, where: object, limits: Text = YAML) -> Any:
    """Parse YAML text; what aliases repeat counts each time.

    Raises:
        ValueError, yaml.YAMLError: the text is no YAML, or not UTF-8.
        MoecError: the text is above a limit.
    """
    if len(raw) > limits.bytes:
        _too_much(where, f"{len(raw):,} bytes", f"at most {limits.bytes:,} bytes", "shorten it")
    text = raw.decode("utf-8")
    for nodes, depth in _nodes(text):
        if nodes > limits.items:
            found = f"over {limits.items:,} values, with those that aliases repeat"
            _too_much(where, found, f"at most {limits.items:,} values", "write it without aliases")
        if depth > limits.depth:
            found = f"lists or objects in over {limits.depth} levels"
            _too_much(where, found, f"at most {limits.depth} levels", "correct the file")
    return yaml.load(text, _Loader)


def _nodes(text: str) -> Iterator[tuple[int, int]]:
    """The number of nodes and the depth so far, after each event of the parser."""
    count, depth = 0, 0
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, _YAML):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"alias {str(event.anchor)[:80]!r} of nothing, or of itself")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if _LONE.search(event.value):  # libyaml refuses it itself
                raise yaml.YAMLError("a lone surrogate: half of a character")
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, count))
            count += 1
            if event.anchor:
                sizes.pop(event.anchor, None)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = count - before
        depth = len(opened)
        yield count, depth
