"""Find the files in a folder that no build of moec wrote, before a build replaces the folder."""

import json
import os
import re
from pathlib import Path
from typing import Any

from moec.artefact.card import CARD, read_card
from moec.artefact.engine_job import ENGINES
from moec.artefact.manifest import FORMAT, NAME
from moec.spec.bounded.own import DRAFT, is_regular

#: what moec leaves in an artefact without listing it: what `moec engine --trtexec` writes, and, if
#: a process was killed, a draft of the manifest or engines that are not in the manifest yet
_LEFT = re.compile(
    rf"{re.escape(DRAFT)}[0-9a-f]{{16}}|\.({re.escape(NAME)}|README\.md)\.([0-9a-f]{{16}}|\d+)"
    rf"|\.{ENGINES}\.moec-(partial|replaced)-\d+/.*"
    rf"|({ENGINES}|trtexec)/(model|vision)[^/]*\.engine"
    rf"|({ENGINES}|trtexec)/plugin/(build\.sh|programs\.bin|[a-z_]+\.(h|cpp|so))"
)
#: the longest manifest that counts as one, in bytes
_LONGEST = 1 << 30


def foreign_file(folder: Path) -> str | None:
    """The first file in `folder` that its manifest does not list; None if there is none.

    A file is foreign unless the manifest lists it, or it is the manifest or a leftover of moec. A
    folder without a manifest of moec holds nothing else. Links count as files and are not followed.
    """
    listed = _listed(folder / NAME)
    found = files_below(folder)
    if listed is None:
        return found[0] if found else None
    return next((name for name in found if name not in listed and not is_left(name)), None)


def is_left(name: str) -> bool:
    """Whether moec may have left the file `name` in an artefact without listing it."""
    return _LEFT.fullmatch(name) is not None


def is_artefact(folder: Path) -> bool:
    """Whether `folder` has a manifest of moec."""
    return _listed(folder / NAME) is not None


def files_below(folder: Path) -> list[str]:
    """Every file and link below `folder`, and every empty folder, by relative name, sorted."""
    found = []
    for at, folders, files in os.walk(folder):
        place = Path(at).relative_to(folder)
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        found += [(place / name).as_posix() for name in (*files, *links)]
        if not files and not folders and at != str(folder):
            found.append(place.as_posix())
    return sorted(found)


def _listed(path: Path) -> set[str] | None:
    """The names of files that a manifest lists; None if it is no manifest of moec."""
    try:
        if not is_regular(path) or path.stat().st_size > _LONGEST:
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return None
    weights = _object(values.get("weights"))
    inside = {} if weights.get("folder") else _object(weights.get("shards"))
    engines = [_object(each) for each in _object(values.get("engines")).values()]
    files = [name for each in engines for name in (each.get("file"), *_object(each.get("files")))]
    named = {name for name in files if isinstance(name, str)}
    card = read_card(path.parent)
    whole = card is not None and not card.after and card.sha256 == weights.get("card")
    own = {CARD} if whole else set()  # sections that somebody added must not be lost
    return {NAME, *_object(values.get("files")), *inside, *named, *own}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
