"""The journal of a packed file: which weights are on disk, so that packing can be resumed.

The journal lies beside the packed file. Its first line identifies the file that is being written.
Each further line names a weight that is on disk.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry

#: the name of the packed file in an artefact
PACKED = "weights.safetensors"


def fingerprint(
    header: bytes, packings: Mapping[str, Packing], entries: Mapping[str, TensorEntry]
) -> str:
    """Identify the packed file: its layout, its packings, and the present state of its sources."""
    digest = hashlib.sha256(header)
    digest.update("".join(p.model_dump_json() for p in packings.values()).encode())
    for file in sorted({entry.file for entry in entries.values()}):
        status = file.stat()
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def journal_of(path: Path) -> Path:
    """The journal of the packed file `path`."""
    return path.with_name(f"{path.name}.journal")


def discard(path: Path) -> None:
    """Remove an unfinished packed file and its journal."""
    for file in resumable_files(path):
        file.unlink()


def resumable_files(path: Path) -> tuple[Path, ...]:
    """The unfinished packed file `path` and its journal, if at least one weight is on disk."""
    journal = journal_of(path)
    if path.is_file() and journal.is_file() and journal.read_bytes().count(b"\n") > 1:
        return path, journal
    return ()


def resume(path: Path, fingerprint: str, size: int, known: set[str]) -> set[str]:
    """The names of the weights that an earlier call for the same file has written.

    If the journal belongs to another file, no weight counts as written. The journal is written anew
    with `fingerprint` and these names.
    """
    journal = journal_of(path)
    try:
        first, *lines = journal.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        first, lines = "", []
    done = set(lines[:-1])  # what follows the last line break was cut off
    whole = path.is_file() and path.stat().st_size == size
    if not whole or first != fingerprint or not done <= known:
        done = set()
    text = "".join(f"{line}\n" for line in (fingerprint, *sorted(done)))
    journal.write_text(text, encoding="utf-8")
    return done
