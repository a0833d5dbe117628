"""Where a file of a folder from outside may really be, once links are followed.

A link in a folder from a stranger may point to any file of this user. So a file of an artefact or
of a checkpoint counts only if its real path lies in that folder. This holds for every file that
moec looks up by its own name, such as a config, an index, a tokenizer or a template. Only shards of
weights may lie elsewhere, where the user allows it (`moec.weights.trust.links`).

The cache of a download tool is one folder for this purpose: it keeps the bytes in
`REPOSITORY/blobs/HASH`, and `REPOSITORY/snapshots/REVISION/NAME` is a link to them.
"""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from moec.spec.errors import refuse

#: the folders of a download cache
SNAPSHOTS, BLOBS = "snapshots", "blobs"


def inside(path: Path, home: Path) -> Path | None:
    """The real path of `path` if it lies in the folder `home` or in its download cache, or None.

    The file need not exist.
    """
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(home))
    return real if real.is_relative_to(folder) or real.parent == blobs_of(folder) else None


def blobs_of(real: Path) -> Path | None:
    """The folder with the bytes of the download cache that the folder `real` is a snapshot of.

    None if it is no snapshot, or if `blobs` is a link itself.
    """
    for folder in (real, *real.parents):
        if folder.parent.name == SNAPSHOTS:
            blobs = folder.parent.parent / BLOBS
            return blobs if blobs.is_dir() and not blobs.is_symlink() else None
    return None


def is_regular(path: Path) -> bool:
    """Whether `path` leads to a regular file: no folder, device, pipe or socket."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def check_utf8(path: Path) -> None:
    """Refuse a path whose bytes are not UTF-8: manifests, ONNX and other engines hold no other.

    Raises:
        MoecError: the path, or where it leads, is not UTF-8.
    """
    for each in (str(path), os.path.realpath(path)):
        if not each.isascii() and any("\udc80" <= char <= "\udcff" for char in each):
            refuse(
                path,
                "a path that is not UTF-8",
                "a path that is UTF-8, as manifests and other engines take it",
                "rename the folder, or use another",
            )


def own_file(path: Path, home: Path, next_step: str | None = None) -> Path:
    """The real path of `path`, a file of the folder `home`; the file need not exist.

    Raises:
        MoecError: a link leads out of the folder; `next_step` is a part of the message.
    """
    real = inside(path, home)
    if real is None:
        refuse_link(path, home, next_step or f"put a copy of the file into {home}")
    return real


def find_own(folder: Path, name: str, next_step: str | None = None) -> Path | None:
    """The real path of the file `name` of `folder`; None if there is no such regular file.

    Raises:
        MoecError: as `own_file`.
    """
    path = folder / name
    return own_file(path, folder, next_step) if is_regular(path) else None


def refuse_link(path: Path, home: Path, next_step: str) -> NoReturn:
    """Refuse the link `path`, which leads out of the folder `home`."""
    refuse(
        path,
        f"a link to {os.path.realpath(path)}, which is outside its folder",
        f"a file inside {home}",
        next_step,
    )


#: how to open a file that must be new, and no link
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


#: how the name of a draft begins; it is short, since a file's own name may be as long as can be
DRAFT = ".moec-draft."


def put(folder: int, name: str, text: str) -> None:
    """Write a file of the folder of a descriptor in one step: readers see the old or the new one.

    A stranger's folder may have links of many names: the draft's name is drawn, and no link is
    followed. A user who could not read the old file cannot read the new one.

    Raises:
        OSError: it cannot be written.
    """
    try:
        old = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        old = None
    replaces = old is not None and stat.S_ISREG(old.st_mode)
    draft = f"{DRAFT}{secrets.token_hex(8)}"
    handle = os.open(draft, _NEW, 0o600 if replaces else 0o666, dir_fd=folder)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            if old is not None and replaces:
                _keep_access(handle, old)
            file.write(text)
        os.rename(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(draft, dir_fd=folder)
        raise


def _keep_access(handle: int, old: os.stat_result) -> None:
    """Give an open file the mode of a file that it replaces; owner and group too, if allowed."""
    new = os.fstat(handle)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with suppress(PermissionError):
            os.fchown(handle, old.st_uid, old.st_gid)
    os.fchmod(handle, stat.S_IMODE(old.st_mode) & 0o777)


def put_at(path: str | Path, text: str) -> None:
    """Write a file that the user names, in one step; a link there is followed.

    If the disk is full, the old file stays as it was. The text goes straight into a path that is no
    regular file, such as /dev/stdout.

    Raises:
        OSError: it cannot be written.
    """
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_file():
        real.write_text(text, encoding="utf-8")
        return
    folder = os.open(real.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        put(folder, real.name, text)
    finally:
        os.close(folder)
