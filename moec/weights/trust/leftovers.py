"""Which half-written folders this user's own builds have left behind.

An archive from a stranger may hold a hidden folder that is named like what a killed build leaves
beside `--out`, with links in it or with weights of its own. So a build records its folder while it
writes it, and the next build goes on with a folder only if the record is there. A record holds the
path, the device and the inode, which no archive can know. Without a record, packing starts anew.
"""

import os
import stat
from pathlib import Path

from moec.weights.trust.records import allow, disallow, is_allowed


def record(folder: Path) -> str:
    """Record that this build writes `folder`; what `forget` takes.

    Raises:
        OSError: there is no such folder.
    """
    identity = _identity(folder)
    allow("partial", identity)
    return identity


def forget(identity: str) -> None:
    """Drop a record, because its folder is finished or gone."""
    disallow("partial", identity)


def take_over(folder: Path) -> bool:
    """Whether a build of this user has left `folder`; the record is dropped, if there is one."""
    try:
        identity = _identity(folder)
    except OSError:
        return False
    own = is_allowed("partial", identity)
    forget(identity)
    return own


def _identity(folder: Path) -> str:
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(str(folder))
    return f"{status.st_dev}:{status.st_ino}:{os.path.realpath(folder)}"
