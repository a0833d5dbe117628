"""File the report of a proof in the manifest of the artefact that was proven, and of no other."""

import fcntl
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from moec.artefact.artefact import Artefact, check_digest, open_artefact, write_manifest
from moec.artefact.manifest import NAME, digest_of
from moec.artefact.opening.held import held, refuse_replaced
from moec.spec.errors import MoecError, refuse
from moec.weights.packed.hashed import file_sha256
from moec.weights.shard import read_shard


class Provable(Protocol):
    """A report that knows which artefact it is about."""

    identity: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest."""
        ...


def identity(artefact: Artefact) -> str:
    """A SHA-256 that tells an artefact from any other, and from itself after a change.

    It covers the manifest without its report, the bytes of all small files, and the sizes and
    headers of the weights. It says of the weights' data what the manifest says of them. Weights in
    a folder that this user has not allowed count as missing: they are not looked at.
    """
    values = json.loads(artefact.manifest.to_json())
    digest = hashlib.sha256(digest_of(values, ("digest", "parity")).encode())
    for name in artefact.manifest.files:
        digest.update(file_sha256(artefact.path / name).encode())
    for name in artefact.manifest.weights.shards:
        digest.update(_shard(artefact, name).encode())
    return digest.hexdigest()


def _shard(artefact: Artefact, name: str) -> str:
    try:
        path = artefact.shard(name)
    except MoecError:  # it is where this user allows no weights
        return "missing"
    if not path.is_file():
        return "missing"
    found = read_shard(path)
    return f"{found.size} {found.header_sha256}"


def record(path: str | Path, report: Provable, weights_from: str | Path | None = None) -> None:
    """Store `report` in the manifest of the artefact at `path`.

    Of two processes that do so at once, one waits for the other. `weights_from` is the folder of
    the weights that were proven, as in `open_session`.

    Raises:
        MoecError: the artefact at `path` is not the one that was proven, its manifest is damaged
            (exit code 1), or the manifest cannot be written.
    """
    path = Path(path)
    with held(path) as folder:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # released when the folder is closed
            artefact = open_artefact(path, weights_from)
            check_digest(artefact)
            if report.identity != identity(artefact):
                refuse(
                    path,
                    "another artefact than the one that was proven, or one that has changed since",
                    "the artefact that the report is about",
                    f"moec validate {path}",
                )
            refuse_replaced(path, folder)
            parity = artefact.manifest.model_copy(update={"parity": report.to_dict()})
            write_manifest(path, parity, folder)
        except OSError as error:
            refuse(
                path / NAME,
                error.strerror or error,
                "a folder that can be written, with room on the disk",
                f"make room, or let the folder be written; then moec validate {path}",
            )
