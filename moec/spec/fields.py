"""Read a JSON object field by field, so that no field is ignored by accident.

Every field must be read, or be listed as having no effect ("inert"), or it is an error.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moec.spec.bounded.limits import JSON
from moec.spec.bounded.own import own_file
from moec.spec.bounded.read import parse_json, read_bytes
from moec.spec.errors import MoecError, refuse

REQUIRED: Any = object()
_NEXT = "correct the field, or describe the model in a spec file (moec spec schema)"


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises:
        MoecError: the file is missing, is not JSON, holds something other than an object, or is
            above a limit of `moec.spec.bounded.limits`.
    """
    raw = read_bytes(path, JSON.bytes, "a readable JSON file", f"check that {path} exists")
    try:
        value = parse_json(raw, path)
    except (ValueError, RecursionError) as error:
        refuse(path, f"broken JSON: {error}", "one JSON object", "download the file again")
    if not isinstance(value, dict):
        found = f"JSON of type {type(value).__name__}"
        refuse(path, found, "one JSON object", "download the file again")
    return value


def read_own_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`, a file of a folder that may come from a stranger.

    Raises:
        MoecError: as `read_json`; or the file is a link that leads out of its folder.
    """
    own_file(path, path.parent)
    return read_json(path)


def shown(value: object) -> str:
    """`value` as a message shows it: at most 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


class Fields:
    """The fields of one JSON object. `take` reads a field; `finish` refuses fields nobody read."""

    def __init__(self, where: str, values: dict[str, Any], next_step: str = _NEXT) -> None:
        self.where, self.next_step = where, next_step
        self.left = dict(values)
        self.taken: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.left.get(key) is not None

    def take(self, key: str, *kinds: type, default: Any = REQUIRED) -> Any:
        """Read field `key`; a null field counts as missing.

        Raises:
            MoecError: the value has none of the types `kinds`, or the field is missing and there
                is no `default`.
        """
        value = self.left.pop(key, None)
        self.taken.add(key)
        names = " or ".join(kind.__name__ for kind in kinds)
        if value is None:
            if default is REQUIRED:
                raise self.error(key, "no such field", names)
            return default
        exact = type(value) in kinds or (float in kinds and type(value) is int)
        if not exact:
            raise self.error(key, shown(value), names)
        if isinstance(value, int | float) and not abs(value) < 1e300:
            raise self.error(key, "an infinite or far too large number", names)
        return value

    def inner(self, key: str) -> "Fields":
        """Read the object in field `key`, to be read field by field in turn."""
        return Fields(f"{self.where}.{key[:200]}", self.take(key, dict), self.next_step)

    def size(self, key: str, most: int = 2**31 - 1) -> int:
        """Read field `key`, an integer from 1 to `most`. The default is far above any model."""
        value: int = self.take(key, int)
        if not 1 <= value <= most:
            raise self.error(key, str(value), f"1 to {most}, which is far above any known model")
        return value

    def require(self, key: str, expected: Any, default: Any = REQUIRED) -> None:
        """Refuse the model unless field `key` is `expected`.

        Use it for fields whose other values would change the arithmetic in a way that no graph
        supports.
        """
        found = self.take(key, type(expected), default=default)
        if found != expected:
            raise self.error(key, repr(found), f"{expected!r}, the only supported value")

    def finish(self, inert: Iterable[str]) -> None:
        """Refuse fields that nobody read, except those in `inert`: they do not affect inference.

        Neither does an unknown field that is null, because code that knows it takes its default.
        """
        given = {key for key, value in self.left.items() if value is not None}
        unknown = sorted(given - set(inert))
        if unknown:
            raise self.error(
                unknown[0],
                f"unknown field, value {shown(self.left[unknown[0]])}",
                f"fields of such a config, as {', '.join(sorted(self.taken)[:6])}, ...",
            )

    def error(self, key: str, found: str, expected: str) -> MoecError:
        """Make the error for field `key`; the caller raises it."""
        return MoecError(
            f"{self.where}.{key[:200]}" if ":" in self.where else f"{self.where}: {key[:200]}",
            found,
            expected,
            self.next_step,
        )
