"""Which half-written folders this user's own builds have left behind.

An archive from a stranger may hold a hidden folder that is named like what a killed build leaves
beside `--out`, with links in it or with weights of its own. So a build records its folder while it
writes it, and the artefact that it replaces while that is out of its place. The next build goes on
with a folder, or puts it back, only if the record is there. A record holds the path, the device and
the inode, which no archive can know. Without a record, packing starts anew.
"""

import os
import stat
from pathlib import Path

from moec.weights.trust.records import allow, disallow, is_allowed


def record(folder: Path, name: Path | None = None) -> str:
    """Record that this build writes `folder`, or moves it to `name`; what `forget` takes.

    Raises:
        OSError: there is no such folder.
    """
    identity = _identity(folder, name or folder)
    allow("partial", identity)
    return identity


def forget(identity: str) -> None:
    """Drop a record, because its folder is finished or gone."""
    disallow("partial", identity)


def take_over(folder: Path) -> bool:
    """Whether a build of this user has left `folder`; the record is dropped, if there is one."""
    try:
        identity = _identity(folder, folder)
    except OSError:
        return False
    own = is_allowed("partial", identity)
    forget(identity)
    return own


def _identity(folder: Path, name: Path) -> str:
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(str(folder))
    return f"{status.st_dev}:{status.st_ino}:{os.path.realpath(name)}"
