"""Notice that another command has replaced an artefact while this one read it.

A build renames a folder over the old one, and `moec engine` writes a new manifest into the folder.
A command that reads on then sees files of two artefacts, each of them sound.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moec.artefact.manifest import NAME, Manifest
from moec.spec.bounded.limits import JSON
from moec.spec.bounded.read import read_bytes
from moec.spec.errors import MoecError, refuse


@contextmanager
def held(path: Path) -> Iterator[int]:
    """Hold the folder `path` open for a block, and yield its descriptor.

    An error of the block gives way to that of a folder that was replaced, since it is about files
    of two artefacts.

    Raises:
        MoecError: there is no such folder; or, when the block ends, another folder is in its place,
            or its manifest says something else, besides the report of a proof.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        found = f"no {NAME}" if absent else error.strerror or error
        refuse(path, found, "a folder that build wrote", "moec build --help")
    try:
        opened = _text(path)
        try:
            yield handle
        except Exception:
            _refuse_changed(path, handle, opened)
            raise
        _refuse_changed(path, handle, opened)
    finally:
        os.close(handle)


def refuse_replaced(path: Path, handle: int) -> None:
    """Refuse to go on if `path` is not the folder of descriptor `handle` any more.

    The descriptor keeps the number of the old folder from being used again.

    Raises:
        MoecError: another folder is there, or none.
    """
    try:
        same = os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        same = False
    if not same:
        there = os.path.lexists(path)
        _refuse(path, "another folder, put there" if there else "no folder any more, taken away")


def _refuse_changed(path: Path, handle: int, opened: bytes | None) -> None:
    refuse_replaced(path, handle)
    now = _text(path)
    if now != opened and _content(now) != _content(opened):
        _refuse(path / NAME, "another manifest, put there")


def _refuse(where: Path, what: str) -> None:
    refuse(
        where,
        f"{what} by another command meanwhile",
        "the same folder from start to end",
        "run the command again",
    )


def _text(path: Path) -> bytes | None:
    """The bytes of the manifest; None where there is none that can be read."""
    try:
        return read_bytes(path / NAME, JSON.bytes)
    except MoecError:
        return None


def _content(text: bytes | None) -> object:
    """What the manifest `text` says, besides the report of a proof."""
    try:
        manifest = Manifest.model_validate_json(text or b"")
    except ValueError:
        return text
    return manifest.model_copy(update={"parity": None, "digest": None}).to_json()
