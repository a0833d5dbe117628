"""Where a file of an artefact or of a checkpoint may really be, once links are followed.

A link in a folder from a stranger may point to any file of this user. So a file counts only if its
real path lies in the folder itself, in a folder that the user names, or in one that this user has
allowed before (`moec.weights.trust.records`).

The cache of a download tool is one folder for this purpose: it keeps the bytes in
`REPOSITORY/blobs/HASH`, and `REPOSITORY/snapshots/REVISION/NAME` is a link to them.
"""

import os
import stat
from pathlib import Path

from moec.spec.errors import refuse
from moec.weights.trust.records import folder_is_allowed

#: the folders of a download cache
SNAPSHOTS, BLOBS = "snapshots", "blobs"


def reachable(path: Path, home: Path, named: Path | None = None) -> Path | None:
    """The real path of `path`, a file of the folder `home`; None if it is not allowed to be there.

    `named` is a folder that the user named for this call. The file need not exist.
    """
    real = Path(os.path.realpath(path))
    for folder in (home, named):
        if folder is None:
            continue
        inside = Path(os.path.realpath(folder))
        if real.is_relative_to(inside) or real.parent == blobs_of(inside):
            return real
    return real if folder_is_allowed(real.parent) else None


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


def own_file(path: Path, home: Path, named: Path | None, next_step: str) -> Path:
    """The real path of a file of the folder `home`; see `reachable`.

    Raises:
        MoecError: a link leads out of the folder; `next_step` is a part of the message.
    """
    real = reachable(path, home, named)
    if real is None:
        refuse(
            path,
            f"a link to {os.path.realpath(path)}, which is outside its folder",
            f"a file inside {home}",
            next_step,
        )
    return real
