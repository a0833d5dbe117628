"""What this user has allowed, as small files in the user's own state folder.

An artefact from a stranger says where its weights lie, and may contain native code. moec follows it
only to what this user built, bound or names now. A build therefore records the folders that its
weights came from, and the hashes of the native code that it made. Records lie outside artefacts, so
that an artefact cannot bring its own: in $XDG_STATE_HOME/moec, by default ~/.local/state/moec.

Each record is a file whose name is a hash of what is allowed. Processes that write at once write
different files, or the same file with the same content.
"""

import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Literal

#: "folder": the real path of a folder with weights; "adapter": that of an adapter that was merged;
#: "native": the SHA-256 of an engine or a plugin; "partial": a folder that a build is writing,
#: or has moved away (`moec.weights.trust.leftovers`)
Kind = Literal["folder", "adapter", "native", "partial"]
#: the most records of a kind; beyond it folders that are gone are dropped first, then the oldest
MOST = 4096

#: what this process has allowed, which holds even if the state folder cannot be written
_here: set[tuple[Kind, str]] = set()


def state_folder() -> Path | None:
    """The folder of the records; None if this user has no home folder."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # the specification of XDG says to ignore a relative path
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        base = os.path.join(home, ".local", "state")
    return Path(base) / "moec"


def allow(kind: Kind, value: str) -> bool:
    """Record that this user allows `value`; False if only this process remembers it.

    A state folder that cannot be written is no error, since it must not fail a build.
    """
    _here.add((kind, value))
    file = _file(kind, value)
    if file is None:
        return False
    draft = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft.write_bytes(os.fsencode(value))
        draft.replace(file)
        _drop(file.parent, kind)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        return False
    return True


def disallow(kind: Kind, value: str) -> None:
    """Drop the record of `value`, if there is one and the state folder can be written."""
    _here.discard((kind, value))
    file = _file(kind, value)
    with suppress(OSError):
        if file is not None:
            file.unlink()


def is_allowed(kind: Kind, value: str, on_disk: bool = False) -> bool:
    """Whether this user has allowed `value`.

    What only this process remembers counts too, unless `on_disk` is set.
    """
    if (kind, value) in _here and not on_disk:
        return True
    file = _file(kind, value)
    try:
        return file is not None and file.is_file()
    except OSError:
        return False


def allow_folder(folder: Path) -> bool:
    """Record a folder with weights, by its real path; the root of the file system never counts."""
    real = os.path.realpath(folder)
    return real != os.path.sep and allow("folder", real)


def folder_is_allowed(real: Path, on_disk: bool = False) -> bool:
    """Whether this user has allowed the folder `real`, a real path; what is below it is another.

    Somebody who once built from a high folder, such as their home, has not allowed all that is in
    it. `on_disk` is as in `is_allowed`.
    """
    return is_allowed("folder", str(real), on_disk)


def _file(kind: Kind, value: str) -> Path | None:
    state = state_folder()
    name = hashlib.sha256(os.fsencode(value)).hexdigest()
    return state / "allowed" / kind / name if state else None


def _drop(folder: Path, kind: Kind) -> None:
    """Keep the number of records bounded."""
    if len(os.listdir(folder)) <= MOST:
        return
    aged = []
    for file in folder.iterdir():
        with suppress(OSError):  # another process may drop it at the same time
            place = os.fsdecode(file.read_bytes())
            gone = kind in ("folder", "adapter") and not os.path.isdir(place)
            aged.append((not gone, file.stat().st_mtime_ns, file))
    for _, _, file in sorted(aged)[: len(aged) - MOST * 3 // 4]:
        with suppress(OSError):
            file.unlink()
