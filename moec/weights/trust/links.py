"""Where a shard of an artefact or of a checkpoint may really be, once links are followed.

Weights are large, so shards may lie outside their folder, unlike all other files
(`moec.spec.bounded.own`): in a folder that the user names, or in one that this user has allowed
before (`moec.weights.trust.records`). `moec.weights.shard` then reads nothing but safetensors.
"""

import os
from pathlib import Path

from moec.spec.bounded.own import inside, refuse_link
from moec.weights.trust.records import folder_is_allowed


def reachable(path: Path, home: Path, named: Path | None = None) -> Path | None:
    """The real path of `path`, a shard of the folder `home`; None if it is not allowed to be there.

    `named` is a folder that the user named for this call. The file need not exist.
    """
    for folder in filter(None, (home, named)):
        if real := inside(path, folder):
            return real
    real = Path(os.path.realpath(path))
    return real if folder_is_allowed(real.parent) else None


def own_shard(path: Path, home: Path, named: Path | None, next_step: str) -> Path:
    """The real path of a shard of the folder `home`; see `reachable`.

    Raises:
        MoecError: a link leads to where no shard may be; `next_step` is a part of the message.
    """
    real = reachable(path, home, named)
    if real is None:
        refuse_link(path, home, next_step)
    return real
